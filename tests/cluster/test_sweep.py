import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from runs import CHAOS

from fedray.cli import main as command_line
from fedray.cluster import tune as module
from fedray.cluster.connection import send_own_code
from fedray.cluster.trials import Experiment, change, expand, images_planned
from fedray.cluster.tune import bundles, sweep
from fedray.commands.sweep import load_experiment, main
from fedray.config import Config
from fedray.data.partition import IID, Dirichlet
from fedray.errors import RunError, UserError
from fedray.presets import PRESETS, SMOKE
from fedray.record.provenance import environment
from fedray.reports.tables import shown

ROOT = Path(__file__).parents[2]
FIGURE2 = ROOT / "experiments/figure2.py"


@pytest.fixture
def in_this_process(ray, monkeypatch):
    """Have trials trained here, sequentially, once they were sent: a process of Tune's imports for ten seconds first.

    For tests of what is asked for, recorded and made of the runs, not of what Tune does with trials.
    """

    def tune(trials, examples, asha, added, callbacks, watched):
        send_own_code()
        by_name = ray.cloudpickle.loads(ray.cloudpickle.dumps({trial.directory.name: trial for trial in trials}))
        for name in by_name:
            module._train({"trial": name}, by_name, environment(), added, asha, watched)

    monkeypatch.setattr(module, "_tune", tune)
    monkeypatch.setattr(module, "keep_to_fraction", lambda config: None)  # which hides GPUs from this process
    monkeypatch.setattr(module.tune, "report", lambda told: None)


# What is to be run


def test_all_combinations_the_last_fastest():
    found = expand(Config(local_epochs=1), {"clients": [2, 4], "seed": [0, 1, 2]})
    assert [(c.clients, c.seed) for c in found] == [(2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2)]


def test_values_that_follow_from_others():
    space = {"clients": [2, 4, 8], "rounds": lambda config: config.rounds * config.clients // 4}
    assert [c.rounds for c in expand(Config(local_epochs=2, rounds=40), space)] == [20, 40, 80]
    space = {"clients": [2, 4], "rounds": lambda config: [5, 10] if config.clients == 2 else 7}
    assert [(c.clients, c.rounds) for c in expand(Config(local_epochs=2), space)] == [(2, 5), (2, 10), (4, 7)]


def test_the_same_configuration_counts_once():
    space = {"partition": ["iid", IID(), "dirichlet:0.1"], "actors": [1, 2]}
    found = expand(Config(local_epochs=1), space)
    assert [c.partition for c in found] == [IID(), Dirichlet(0.1)]


def test_changes_of_one_setting():
    config = Config(local_epochs=2)
    assert change(config, "local_steps", 5) == Config(local_steps=5)
    assert change(config, "task.snr_gamma", 5.0).task.snr_gamma == 5.0
    with pytest.raises(UserError, match="there is no setting 'client'; did you mean 'clients'"):
        change(config, "client", 5)
    with pytest.raises(UserError, match="no values for 'seed'"):
        expand(config, {"seed": []})


def test_a_hash_is_of_what_matters():
    config = Config(local_epochs=1)
    assert config.sha256 == replace(config, actors=3, address="auto", cpus_per_actor=0.5).sha256
    assert config.sha256 != replace(config, seed=1).sha256


@pytest.mark.slow
def test_images_planned_are_those_trained_on(toy_config, tmp_path, in_this_process):
    config = toy_config(fraction=0.5)
    done = sweep(Experiment(config, {"seed": [0]}), tmp_path)
    assert images_planned(config, 32) >= sum(row["images"] for row in done.runs[0].rows) == 3 * 2 * 2 * 8


# Where


def test_a_bundle_per_actor(ray):
    config = Config(local_epochs=1, cpus_per_actor=0.5, gpus_per_actor=0.25)
    alone = bundles(replace(config, actors=0))
    assert len(alone) == 1
    assert alone[0]["CPU"] == 0.5
    assert alone[0]["GPU"] == 0.25
    driver, *actors = bundles(replace(config, actors=3))
    assert actors == [{"CPU": 0.5, "GPU": 0.25}] * 3
    assert "CPU" not in driver
    (node,) = driver
    assert node in ray.cluster_resources()  # the driver stays on the node that has the runs


@pytest.mark.parametrize(
    ("nodes", "slots", "trials", "actors"),
    [
        (1, 2, 6, 0),  # each trial in one process
        (1, 16, 2, 4),  # never more than the cohort
        (1, 16, 6, 2),
        (8, 16, 18, 1),  # of several nodes all are used: an actor can be on any
        (8, 64, 4, 4),
    ],
)
def test_a_trials_share_of_the_cluster(monkeypatch, nodes, slots, trials, actors):
    monkeypatch.setattr(module, "alive", lambda: dict.fromkeys(range(nodes)))
    monkeypatch.setattr(module, "count_slots", lambda config: slots)
    trial = module.Trial(Config(local_epochs=1, clients=4), {}, Path("here"))
    assert module._with_actors(trial, trials).actors == actors


def test_more_than_there_is_fails_at_once(toy_config, tmp_path, ray):
    began = time.monotonic()
    with pytest.raises(UserError, match="the trial seed-0-.*: --actors 3 needs 3 CPUs, and there are 2 CPUs"):
        sweep(Experiment(toy_config(actors=3), {"seed": [0, 1]}), tmp_path / "a")
    with pytest.raises(UserError, match="--gpus-per-actor 1: this machine .or cluster. has no GPU"):
        sweep(Experiment(toy_config(actors=None, gpus_per_actor=1.0), {"seed": [0]}), tmp_path / "b")
    assert time.monotonic() - began < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_waiting_for_resources_ends(toy_config, tmp_path, ray):
    """Somebody else has the CPUs."""

    @ray.remote(num_cpus=2)
    class Other:
        def ready(self):
            return True

    other = Other.remote()
    assert ray.get(other.ready.remote())
    try:
        with pytest.raises(
            RunError, match="no trial could start in 3 s .*. One needs 1 CPUs and 0 GPUs; free now: 0 CPUs"
        ):
            sweep(Experiment(toy_config(start_timeout=3.0), {"seed": [0]}), tmp_path)
    finally:
        ray.kill(other)


# What comes out


def hashes(runs):
    return {run.saved["config"]["seed"]: run.result["vector_sha256"] for run in runs}


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("actors", [0, 2])
def test_a_trial_is_the_run_that_it_would_be_alone(toy_config, tmp_path, ray, actors):
    import fedray

    config, news, seeds = toy_config(actors=actors), [], [3, 4] if CHAOS or not actors else [3]
    done = sweep(Experiment(config, {"seed": seeds}), tmp_path / "sweep", on_news=news.append)
    assert not done.missing
    alone = [fedray.run(replace(config, actors=0, seed=seed), tmp_path / str(seed)) for seed in seeds]
    assert hashes(done.runs) == hashes(alone)
    told = [(n.outcome, n.rounds) for n in news if n.trial.config.seed == 3]
    assert told[0] == ("waiting", 0)
    assert [rounds for outcome, rounds in told if outcome == "running"] == [0, 1, 2, 3]
    assert told[-1] == ("complete", 3)
    workers = {client["actor"] for row in done.runs[0].rows for client in row["clients"]}
    assert workers == ({"local"} if actors == 0 else {"actor 0", "actor 1"})
    assert list((done.runs[0].directory / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_what_is_there_is_not_run_again_unless_asked(toy_config, tmp_path, in_this_process):
    first = sweep(Experiment(toy_config(), {"seed": [0, 1]}, "first"), tmp_path)
    times = {run.directory: (run.directory / "result.json").stat().st_mtime_ns for run in first.runs}
    with pytest.raises(UserError, match="holds this sweep already; go on with it by --resume"):
        sweep(Experiment(toy_config(), {"seed": [0, 1]}, "first"), tmp_path)
    # Another sweep in the same place, and the same one with one more seed.
    other = sweep(Experiment(toy_config(), {"clients": [4], "seed": [1, 0]}, "other"), tmp_path)
    more = sweep(Experiment(toy_config(), {"seed": [0, 1, 2]}, "first"), tmp_path, resume=True)
    assert {run.directory for run in other.runs} == set(times)
    assert len(more.runs) == 3
    assert {path: (path / "result.json").stat().st_mtime_ns for path in times} == times
    with pytest.raises(UserError, match="has a trial seed-0-.*not among those asked for now"):
        sweep(Experiment(toy_config(rounds=2), {"seed": [0, 1, 2]}, "first"), tmp_path, resume=True)
    config_json = first.runs[0].directory / "config.json"
    before = config_json.read_text()
    config_json.write_text(before.replace(json.loads(before)["images_sha256"], "0" * 64))
    with pytest.raises(UserError, match="the images of the run at .* have changed since it began"):
        sweep(Experiment(toy_config(), {"seed": [0, 1]}, "third"), tmp_path)
    config_json.write_text(before)
    anew = sweep(Experiment(toy_config(), {"seed": [0]}, "first"), tmp_path, again=True)
    assert anew.runs[0].directory not in times
    assert anew.runs[0].result["vector_sha256"] == first.runs[0].result["vector_sha256"]
    assert len(list(tmp_path.glob("*/config.json"))) == 4


@pytest.mark.slow
def test_a_stopped_trial_goes_on_from_its_last_round(toy_config, tmp_path, in_this_process):
    from runs import fit

    from fedray.federation.pool import LocalPool

    config = toy_config(seed=7)
    whole = sweep(Experiment(config, {"seed": [7]}), tmp_path / "whole").runs[0]
    record = json.loads((tmp_path / "whole/sweep.sweep.json").read_text())
    place = tmp_path / "cut" / record["trials"][0]["directory"]
    rounds = fit(config, LocalPool(config), place)
    next(rounds)
    rounds.close()
    (first,) = (place / "rounds.jsonl").read_text().splitlines()
    (place / "rounds.jsonl").write_text(first[:100])  # a kill cut it short; the checkpoint has it
    first = json.loads(first)
    done = sweep(Experiment(config, {"seed": [7]}), tmp_path / "cut")
    assert done.runs[0].directory == place
    assert done.runs[0].rows[0]["clients"] == first["clients"]
    assert hashes(done.runs) == hashes([whole])


@pytest.mark.slow
def test_one_trials_failure_leaves_the_others(toy_config, tmp_path, ray, monkeypatch):
    """A user's mistake is not tried again; what may pass is, from its last round."""
    from toy import Toy

    monkeypatch.setattr(module, "RETRIES", 1)
    config = toy_config()
    broken = replace(config.task, failing=(0, 1, 2, 3))
    space = {"task.failing": [(), broken.failing], "clients": [4, 40]}
    done = sweep(Experiment(config, space), tmp_path)
    assert isinstance(config.task, Toy)
    assert [run.saved["config"]["task"]["failing"] for run in done.runs] == [[]]
    reasons = {name.rsplit("-", 1)[0]: why for name, why in done.missing.items()}
    assert reasons["failing-clients-40"].startswith("--clients 40: there are only 32 examples")
    assert "no client returned a model" in reasons["failing-0-1-2-3-clients-4"]
    # Mended, it goes on.
    monkey = next(tmp_path.glob("failing-0-1-2-3-clients-4-*"))
    assert (monkey / "failed.txt").read_text().strip() == reasons["failing-0-1-2-3-clients-4"]


@pytest.mark.slow
@pytest.mark.parametrize("actors", [0, 1])
def test_a_trial_that_is_killed_is_tried_again(toy_config, tmp_path, ray, actors):
    """The trial's process is killed once, when it has the first round's samples; then it goes on from there."""
    marker = tmp_path / "killed"

    def fatal(samples, images):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    config = toy_config(evaluate_every=1, actors=actors)
    done = sweep(Experiment(config, {"seed": [0]}), tmp_path / "sweep", metrics={"fatal": fatal})
    assert marker.exists()
    assert not done.missing
    assert [row["round"] for row in done.runs[0].rows] == [1, 2, 3]
    assert not list(done.runs[0].directory.glob("*.txt"))


@pytest.mark.slow
def test_a_trial_that_is_always_killed_is_missing(toy_config, tmp_path, ray, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 1)
    metrics = {"fatal": lambda samples, images: os.kill(os.getpid(), signal.SIGKILL)}
    done = sweep(Experiment(toy_config(), {"seed": [0]}), tmp_path, metrics=metrics)
    assert list(done.missing.values()) == ["its process ended (killed, or out of memory)"]


@pytest.mark.slow
def test_asha_compares_at_equal_images(toy_config, tmp_path, ray):
    """The second learning rate is worse. With E = 4 a round trains twice the images, so that it ends a round sooner."""
    config = toy_config(rounds=20, evaluate_every=2, clients=4)
    space = {"learning_rate": [1e-9, 0.5], "local_epochs": [2, 4]}
    metrics = {"brightness": lambda samples, images: float(samples.mean())}
    with pytest.raises(UserError, match="--asha stops trials by scores along the way: say --evaluate-every"):
        sweep(Experiment(replace(config, evaluate_every=None), space), tmp_path / "a", asha="brightness")
    done = sweep(Experiment(config, space), tmp_path / "b", asha="brightness", metrics=metrics)
    assert [len(run.rows) for run in done.runs] == [20, 20]
    assert {run.saved["config"]["learning_rate"] for run in done.runs} == {1e-9}
    # The first rung is at 181 images: a sixteenth of 20 rounds of 4 clients, 4 epochs of 3 batches of 3.
    assert 20 * 4 * 4 * 3 * 3 // 16 + 1 == 181
    assert not done.missing
    assert {name.rsplit("-", 1)[0]: why for name, why in done.stopped.items()} == {
        "learning-rate-0.5-local-epochs-2": "ASHA stopped it after round 4",  # 256 images; after round 2, 128
        "learning-rate-0.5-local-epochs-4": "ASHA stopped it after round 2",  # 256 images
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").glob("*/rounds.jsonl")}
    again = sweep(Experiment(config, space), tmp_path / "b", asha="brightness", metrics=metrics, resume=True)
    assert again.stopped == done.stopped
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_asha_needs_a_score_that_there_is(toy_config, tmp_path, in_this_process):
    config = toy_config(evaluate_every=2)
    wrong = sweep(Experiment(config, {"seed": [9]}), tmp_path, asha="fid", metrics={"one": lambda *images: 1.0})
    (why,) = wrong.missing.values()
    assert why.startswith("there is no score 'fid'")


@pytest.mark.slow
@pytest.mark.chaos
def test_asha_lets_a_trial_end(toy_config, tmp_path, ray):
    """The second is worse, and its only rung is its last round: its model is saved. In `make chaos`, after a rung."""
    metrics = {"brightness": lambda samples, images: float(samples.mean())}
    space = {"learning_rate": [1e-9, 0.5]}
    experiment = Experiment(toy_config(evaluate_every=4, rounds=4, validation_rounds=4), space)
    done = sweep(experiment, tmp_path / "b", asha="brightness", metrics=metrics)
    assert len(done.runs) == 2
    if CHAOS:
        experiment = Experiment(toy_config(evaluate_every=1, rounds=2), space)
        done = sweep(experiment, tmp_path, asha="brightness", metrics=metrics)
        assert len(done.runs) + len(done.stopped) == 2
        assert all("after round 1" in why for why in done.stopped.values())


# The command


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("BASE = 1 / 0\n")
    (tmp_path / "empty.py").write_text("BASE = 1\n")
    mistakes = {
        ("nothing.py",): "there is no file nothing.py; name an experiment, as experiments/figure2.py.",
        ("broken.py",): "broken.py, line 1: ZeroDivisionError: division by zero.",
        ("empty.py",): "empty.py is not an experiment: it must have BASE, a Config.",
        (FIGURE2, "--clients", "3"): f"--clients is what {FIGURE2} varies; change its SPACE.",
        ("--out", "a", FIGURE2, "--local_epochs", "7"): f"--local-epochs is what {FIGURE2} varies",
        (FIGURE2, "--local-steps", "7"): f"--local-epochs is what {FIGURE2} varies",
        (FIGURE2, "--preset", "digit"): "there is no preset 'digit'; did you mean 'digits'?",
        (FIGURE2, "--resume"): "there is no sweep 'figure2' in",
        (FIGURE2, "--rounds", "0"): "--rounds 0: it must be above 0.",
    }
    monkeypatch.chdir(tmp_path)
    for arguments, message in mistakes.items():
        with pytest.raises(UserError, match=message.replace("(", ".").replace("?", ".")):
            main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_table(tmp_path, ray, request, capsys):
    """SIGKILL of the process group in the middle: finished trials are not run again, and the table is the same."""
    arguments = ["sweep", str(FIGURE2), "--smoke", "--rounds", "4", "--out"]
    command = [sys.executable, "-m", "fedray", *arguments, str(tmp_path / "cut"), "--address", "local"]
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "cut").glob("*/result.json"))) < 2:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        assert killed.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*/result.json")}
    assert 2 <= len(done) < 6
    assert command_line([*arguments, str(tmp_path / "cut")]) == 2
    assert "holds this sweep already" in capsys.readouterr().err
    assert command_line([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list((tmp_path / "cut").glob("*/result.json"))) == 6
    request.getfixturevalue("in_this_process")
    assert command_line([*arguments, str(tmp_path / "whole")]) == 0
    tables = [pd.read_csv(tmp_path / out / "figure2.csv") for out in ("whole", "cut")]
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[0]["clients"]) == [2, 4, 8]
    assert list(tables[0]["loss.n"]) == [2, 2, 2]
    results = [pd.read_parquet(tmp_path / out / "results.parquet") for out in ("whole", "cut")]
    keep = ["run", "sha256", "round", "loss", "fd[digits]"]
    results = [frame[keep].sort_values(["run", "round"]).reset_index(drop=True) for frame in results]
    pd.testing.assert_frame_equal(*results)
    assert len(results[0]) == 6 * 4


CONTROLS = ("same_steps", "same_images")  # of which something is claimed: with five seeds and 2,048 samples
SCRIPTS = (
    "figure2", "figure3", "chosen", "clients_epochs", *CONTROLS, "data_amount", "centralised", "non_iid", "robust",
    "compression", "partial", "methods", "privacy",
)  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiments_ask_for_what_they_say(name):
    script = load_experiment(ROOT / f"experiments/{name}.py")
    found = expand(script.BASE, script.SPACE)
    assert f"fedray sweep experiments/{name}.py" in script.__doc__
    assert {config.seed for config in found} == set(range(5 if name in CONTROLS else 3))
    for config in found:
        config.check()
    if name == "same_steps":
        assert {c.rounds * c.steps(1792 // c.clients) for c in found} == {1200}
        assert len({(c.clients, c.local_steps, c.keep_optimizer) for c in found}) == 4 * 3 * 2
        assert {(c.evaluate_samples, c.train_batch_size) for c in found} == {(2048, 32)}
    if name == "same_images":
        assert {c.rounds * c.local_steps * c.clients * c.train_batch_size for c in found} == {1200 * 256}
        steps = load_experiment(ROOT / "experiments/same_steps.py")
        shared = {c.sha256 for c in found} & {c.sha256 for c in expand(steps.BASE, steps.SPACE)}
        assert len(shared) == 5  # eight clients: each seed's run is in both sweeps
    if name == "chosen":
        steps = {(c.clients, c.rounds * c.steps(1792 // c.clients)) for c in found}
        assert steps == {(4, 560), (1, 560)}
    assert set(SMOKE) <= {"rounds", "test_share", "evaluate_samples", "sampling_steps", "kid_subset_size"}
    assert script.BASE.task == PRESETS["digits"].task


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "figure2"])
def test_experiments_in_short(tmp_path, ray, request, capsys, name):
    """In this process; in `make chaos` on Tune, as figure2 always is."""
    if not CHAOS:
        request.getfixturevalue("in_this_process")
    main([str(ROOT / f"experiments/{name}.py"), "--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "fd[digits]" in printed
    asked = json.loads((tmp_path / f"{name}.sweep.json").read_text())
    assert len(list(tmp_path.glob("*/result.json"))) == len(asked["trials"]) >= 4
    table = pd.read_csv(tmp_path / f"{name}.csv", dtype=str)
    assert len(table) == len(asked["trials"]) / 2  # two seeds
    varied = [setting for setting in asked["varied"] if setting != "seed"]
    assert list(table.columns[: len(varied)]) == varied
    assert {tuple(map(str, row)) for row in table[varied].to_numpy()} == {
        tuple(shown(trial["changes"].get(setting)) for setting in varied) for trial in asked["trials"]
    }
    assert (tmp_path / f"{name}.md").read_text().count("\n") == len(asked["trials"]) / 2 + 2
