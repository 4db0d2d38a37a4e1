"""Callbacks are told of everything, may stop a run, and change nothing else."""

import json
from dataclasses import replace

import pytest
from runs import train

import fedray
from fedray.errors import RunError, UserError
from fedray.federation.callbacks import Callback, EarlyStopping
from fedray.record.run import Run


class Diary(Callback):
    def __init__(self, stop=None):
        self.told, self.stop = [], stop

    def on_start(self, rows):
        self.told.append(("start", [row["round"] for row in rows]))

    def on_client(self, client):
        self.told.append(("client", client["client"], client.pop("loss")))

    def on_evaluation(self, row, images):
        self.told.append(("evaluation", row["round"], images.shape))
        images[:] = 0

    def on_round(self, row):
        self.told.append(("round", json.loads(json.dumps(row))))
        row["loss"] = row["clients"] = None
        return f"round {self.stop} is enough" if row["round"] == self.stop else None

    def on_end(self, result):
        self.told.append(("end", result["rounds"], result.get("stopped")))
        result.clear()

    def of(self, kind):
        return [each[1:] for each in self.told if each[0] == kind]


def same(rows):
    """Rows without what time they took."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "time", "clients")} for row in rows]


def test_they_are_told_of_everything_and_change_nothing(toy_config, tmp_path):
    config = toy_config(rounds=3, evaluate_every=2)
    silent = fedray.run(config, tmp_path / "silent")
    diary = Diary()
    run = fedray.run(config, tmp_path / "told", callbacks=[diary])
    assert run.result["state_sha256"] == silent.result["state_sha256"]
    assert same(run.rows) == same(silent.rows)
    assert [each[0] for each in diary.told[:6]] == ["start", *["client"] * 4, "round"]
    assert [client for client, _ in diary.of("client")] == [0, 1, 2, 3] * 3
    assert [loss for _, loss in diary.of("client")] == [client["loss"] for row in run.rows for client in row["clients"]]
    assert diary.of("evaluation") == [(2, (4, 1, 2, 2)), (3, (4, 1, 2, 2))]
    assert same(row for (row,) in diary.of("round")) == same(run.rows)
    assert diary.of("end") == [(3, None)]
    assert (run.directory / "samples.png").read_bytes() == (silent.directory / "samples.png").read_bytes()


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_is_stopped_is_the_run_of_so_many_rounds_and_can_be_resumed(toy_config, tmp_path, every):
    config = toy_config(rounds=6, evaluate_repeats=2, held_out_share=0.25, checkpoint_every=every)
    short = fedray.run(replace(config, rounds=3), tmp_path / "short")
    whole = fedray.run(config, tmp_path / "whole")
    diary = Diary(stop=3)
    run = fedray.run(config, tmp_path / "stopped", callbacks=[diary])
    assert run.result["stopped"] == run.rows[-1]["stopped"] == "round 3 is enough"
    assert diary.of("end") == [(3, "round 3 is enough")]
    for name in ("state_sha256", "vector_sha256", "scores", "held_out", "rounds", "images", "bytes_up"):
        assert run.result[name] == short.result[name], name
    assert (run.directory / "model/network.pt").exists()
    frame = fedray.load(tmp_path / "stopped")
    assert frame.rounds["complete"].all()
    assert not frame.problems
    assert len(fedray.score_table([run.directory]))
    resumed = fedray.run(config, tmp_path / "stopped", resume=True)
    assert resumed.result["state_sha256"] == whole.result["state_sha256"]
    assert "stopped" not in resumed.result
    assert [row["round"] for row in resumed.rows] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_killed_stops_in_the_same_round(toy_config, tmp_path):
    """Killed after any of its rounds, and then while its model is written."""
    config = toy_config(rounds=6, held_out_share=0.25)
    stopping = EarlyStopping("held_out.global", patience=2, least=1e9)  # never better by so much but for the first
    whole = train(config, tmp_path / "whole", callbacks=[stopping])
    assert [row["round"] for row in whole] == [1, 2, 3]
    assert whole[-1]["stopped"].startswith("held_out.global has not been better than")
    rows = train(config, tmp_path / "cut", rounds=1, callbacks=[replace_of(stopping)])
    while Run(tmp_path / "cut").result is None:
        rows += train(config, tmp_path / "cut", resume=True, rounds=1, callbacks=[replace_of(stopping)])
        assert len(rows) < 10
    assert [row["round"] for row in Run(tmp_path / "cut").rows] == [1, 2, 3]
    ends = [Run(tmp_path / name).result for name in ("whole", "cut")]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]
    assert ends[0]["stopped"] == ends[1]["stopped"]


def replace_of(stopping):
    return EarlyStopping(stopping.score, stopping.patience, stopping.least)


def test_a_run_killed_before_its_result_is_written_ends_as_it_was_told(toy_config, tmp_path):
    config = toy_config(rounds=6)
    run = fedray.run(config, tmp_path, callbacks=[Diary(stop=2)])
    before = run.result
    (tmp_path / "result.json").unlink()
    again = fedray.run(config, tmp_path, resume=True)  # without the callback
    assert again.result["rounds"] == 2
    assert again.result["stopped"] == before["stopped"]
    assert again.result["state_sha256"] == before["state_sha256"]


@pytest.mark.slow
def test_they_run_beside_actors_too(toy_config, tmp_path, ray):
    config = toy_config(rounds=6)
    stopping = EarlyStopping("loss", patience=1, least=1e9)
    runs = [fedray.run(replace(config, actors=n), tmp_path / str(n), callbacks=[stopping]) for n in (0, 1)]
    assert [run.result["rounds"] for run in runs] == [2, 2]
    assert runs[0].result["state_sha256"] == runs[1].result["state_sha256"]
    assert runs[0].result["stopped"] == runs[1].result["stopped"]


def test_one_that_fails_ends_the_run_and_is_named(toy_config, tmp_path):
    class Broken(Callback):
        def on_round(self, row):
            return 1 / 0 if row["round"] == 2 else None

    config = toy_config()
    with pytest.raises(RunError, match=r"the callback .*Broken.on_round failed: ZeroDivisionError: division by zero"):
        fedray.run(config, tmp_path / "run", callbacks=[Broken()])
    run = fedray.run(config, tmp_path / "run", resume=True)
    assert run.result["state_sha256"] == fedray.run(config, tmp_path / "other").result["state_sha256"]


def losses(*values):
    return [{"round": number, "loss": value, "scores": {}, "held_out": {}} for number, value in enumerate(values, 1)]


def stopped_at(stopping, rows):
    return next((row["round"] for row in rows if stopping.on_round(row)), None)


def test_early_stopping_counts_from_the_best():
    nan = float("nan")
    assert stopped_at(EarlyStopping("loss", patience=2), losses(5, 4, 4, 3, 3, 3, 3)) == 6
    assert stopped_at(EarlyStopping("loss", patience=2), losses(5, nan, None, nan, 4)) == 4  # an empty round counts not
    assert stopped_at(EarlyStopping("loss", patience=3), losses(5, 4, 3, 2, 1)) is None
    assert stopped_at(EarlyStopping("loss", patience=1, least=0.5), losses(5, 4, 3.6)) == 3
    scores = [{"round": n, "scores": {"accuracy[digits]": {"value": v}}} for n, v in enumerate((0.1, 0.3, 0.2), 1)]
    assert stopped_at(EarlyStopping("accuracy[digits]", patience=1), scores) == 3
    assert stopped_at(EarlyStopping("accuracy[digits]", patience=1, higher_is_better=False), scores) == 2
    with pytest.raises(UserError, match=r"no score 'acuracy\[digits\]'; did you mean 'accuracy\[digits\]'"):
        EarlyStopping("acuracy[digits]").on_round(scores[0])
    with pytest.raises(UserError, match="patience is 0"):
        EarlyStopping("loss", patience=0)
    resumed = EarlyStopping("loss", patience=2)
    resumed.on_start(losses(5, 4, 4))
    assert resumed.on_round(losses(5, 4, 4, 4)[-1]) == "loss has not been better than 4 (round 2) for 2 evaluations"
