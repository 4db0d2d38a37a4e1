"""Callbacks and trackers of a sweep's trials, and of clients alone; Ray Tune's own callbacks."""

import json
from pathlib import Path

import pytest
from ray import tune

import fedray
from fedray.commands.train import main as train

TRACKER = """
import json
from pathlib import Path

class Lines:
    def start(self, run):
        self.path = run.directory / "lines.txt"
        self.path.write_text(json.dumps([run.name, run.group, run.settings["seed"]]) + "\\n")

    def log(self, entry):
        with open(self.path, "a") as file:
            file.write(json.dumps([entry.round, sorted(entry.pictures), len(entry.table)]) + "\\n")

    def finish(self):
        with open(self.path, "a") as file:
            file.write('"end"\\n')
"""


def lines(directory):
    return [json.loads(line) for line in (directory / "lines.txt").read_text().splitlines()]


class Seen(tune.Callback):
    """Ray Tune's: keeps what trials report. Where it is called is this process, the one that sweeps."""

    results = []

    def on_trial_result(self, iteration, trials, trial, result, **info):
        Seen.results.append((trial.config["trial"], result["round"], result["loss"], result.get("brightness")))


@pytest.fixture
def tracker(tmp_path):
    (tmp_path / "mine.py").write_text(TRACKER)
    return f"{tmp_path / 'mine.py'}:Lines"


@pytest.mark.slow
def test_a_sweep(toy_config, tmp_path, ray, tracker):
    Seen.results.clear()
    config = toy_config(rounds=5, evaluate_every=1)
    done = fedray.sweep(
        fedray.Experiment(config, {"seed": [0, 1]}, name="rates"),
        tmp_path / "sweep",
        metrics={"brightness": lambda samples, reference: float(samples.mean())},
        callbacks=[fedray.EarlyStopping("loss", patience=2, least=1e9)],
        report_to=[tracker],
        tune_callbacks=[Seen()],
    )
    assert not done.missing
    assert [run.result["rounds"] for run in done.runs] == [3, 3]  # each trial has its own copy, which counts anew
    for run in done.runs:
        first, *entries, end = lines(run.directory)
        assert first == [run.directory.name, "rates", run.saved["config"]["seed"]]
        assert [number for number, _, _ in entries] == [0, 1, 2, 3]
        assert [name for _, name, _ in entries] == [["partition"], *[["samples"]] * 3]
        assert [scores for _, _, scores in entries] == [0, 0, 0, 1]
        assert end == "end"
        told = [told[1:] for told in Seen.results if told[0] == run.directory.name]
        assert told == [(row["round"], row["loss"], row["scores"]["brightness"]["value"]) for row in run.rows]


@pytest.mark.slow
def test_clients_alone(toy_config, tmp_path, ray, tracker):
    runs = fedray.run_local_only(toy_config(), tmp_path / "alone", report_to=[tracker, "tensorboard"])
    for number, run in enumerate(runs):
        first, *entries, _ = lines(run.directory)
        assert first == [f"client-{number:04d}", "alone", 0]
        assert [entry[0] for entry in entries] == [0, 1, 2, 3]
        assert (run.directory / "tensorboard").is_dir()


def test_trackers_on_the_command_line(tmp_path, tracker, capsys):
    flags = ["--rounds", "1", "--local-steps", "1", "--evaluate-samples", "0", "--actors", "0"]
    train([*flags, "--out", str(tmp_path / "run"), "--report-to", tracker])
    assert [entry[0] for entry in lines(tmp_path / "run")[1:-1]] == [0, 1]
    assert not (tmp_path / "run/tensorboard").exists()
    train([*flags, "--out", str(tmp_path / "none"), "--report-to", "none"])
    assert not (tmp_path / "none/tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wandbb", "there is no tracker 'wandbb'; did you mean 'wandb'?"),
        ("mine.py:Line", "mine.py has no tracker 'Line': a class with start, log and finish."),
        ("nowhere.py:Lines", "there is no file nowhere.py"),
    ],
)
def test_mistakes(tmp_path, tracker, name, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedray.UserError, match=sentence.replace("?", r"\?")):
        train(["--report-to", name])
    assert {path.name for path in Path().iterdir()} <= {"mine.py", "__pycache__"}


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fedray.UserError, match=r"the package wandb is not installed; pip install 'fedray\[wandb\]'"):
        train(["--report-to", "tensorboard", "wandb"])
