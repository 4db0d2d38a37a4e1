"""More rounds than a run began with, and checkpoints that are rarer than rounds."""

import json
import re
from dataclasses import replace

import pytest
from runs import assert_curves_equal_rows, sha, train

import fedray
from fedray.errors import UserError
from fedray.record.run import Run

STATEFUL = {
    "optimizer": "sgd", "learning_rate": 0.05, "algorithm": "ema:0.9:scaffold",
    "wire": "feedback:topk:0.5", "fraction": 0.5,
}  # fmt: skip


def without_clocks(rows):
    kept = ("round", "cohort", "loss", "steps", "bytes_up", "scores", "held_out")
    return [{name: row[name] for name in kept} for row in rows]


@pytest.mark.parametrize("stopped", [None, 1, 2])
@pytest.mark.parametrize("changes", [{}, STATEFUL, {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20}])
def test_more_rounds_are_as_if_asked_for_from_the_start(toy_config, tmp_path, changes, stopped):
    config = toy_config(rounds=3, evaluate_every=3, **changes)
    more = replace(config, rounds=7)
    train(more, tmp_path / "whole")
    train(config, tmp_path / "run", rounds=stopped)
    train(more, tmp_path / "run", resume=True)
    run, whole = Run.open(tmp_path / "run"), Run.open(tmp_path / "whole")
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    assert run.result["vector_sha256"] == whole.result["vector_sha256"]
    assert run.saved["config"]["rounds"] == run.result["rounds"] == 7
    values = [{name: score["value"] for name, score in row["scores"].items()} for row in run.rows]
    assert values == [{name: score["value"] for name, score in row["scores"].items()} for row in whole.rows]
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in whole.rows]
    assert_curves_equal_rows(tmp_path / "run")


def test_the_old_end_keeps_its_scores(toy_config, tmp_path):
    config = toy_config(rounds=2)
    metrics = {"brightness": lambda samples, images: float(samples.mean())}
    old = fedray.run(config, tmp_path, metrics=metrics).rows[-1]["scores"]
    assert old
    rows = fedray.run(replace(config, rounds=4), tmp_path, resume=True, metrics=metrics).rows
    assert [bool(row["scores"]) for row in rows] == [False, True, False, True]
    assert rows[1]["scores"] == old


@pytest.mark.parametrize(
    ("changes", "rounds", "message"),
    [
        ({}, 2, "--rounds 2: the run at .* has done 3 already; ask for more"),
        ({}, 1, "--rounds 1: the run at .* has done 3 already; ask for more"),
        ({"lr_scheduler": "cosine"}, 5, "learning rate of --lr-scheduler cosine follows from the 3 rounds"),
        ({"lr_scheduler": "linear"}, 5, "learning rate of --lr-scheduler linear follows from the 3 rounds"),
        (
            {"wire": "clip:1.0,noise", "cohort": "poisson:0.5", "target_epsilon": 8.0},
            5,
            "noise of --target-epsilon 8 follows from the 3 rounds",
        ),
    ],
)
def test_other_rounds_that_are_refused(toy_config, tmp_path, changes, rounds, message):
    config = toy_config(**changes)
    train(config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        fedray.run(replace(config, rounds=rounds), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_fewer_rounds_than_asked_for_but_more_than_done(toy_config, tmp_path):
    train(toy_config(rounds=9), tmp_path / "run", rounds=2)
    train(toy_config(rounds=3), tmp_path / "run", resume=True)
    train(toy_config(rounds=3), tmp_path / "whole")
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    last = [Run.open(tmp_path / name).rows[-1]["evaluation"] for name in ("run", "whole")]
    assert last[0]
    assert last[0] == last[1]


def test_killed_while_it_is_extended(toy_config, tmp_path, monkeypatch):
    """Between the two files that are changed: it is the run of before, without its result, which is made again."""
    config = toy_config()
    train(config, tmp_path)
    result, hashed = Run.open(tmp_path).result, sha(tmp_path)

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("fedray.record.run.write", killed)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, rounds=5), tmp_path, resume=True)
    assert Run.open(tmp_path).result is None
    train(config, tmp_path, resume=True)
    assert sha(tmp_path) == hashed
    assert Run.open(tmp_path).result["scores"] == result["scores"]
    train(replace(config, rounds=5), tmp_path, resume=True)
    assert len(Run.open(tmp_path).rows) == 5


def test_clients_alone_go_on_for_more_rounds(toy_config, tmp_path):
    config = toy_config(rounds=2)
    fedray.run_local_only(config, tmp_path / "run")
    runs = fedray.run_local_only(replace(config, rounds=4), tmp_path / "run")
    whole = fedray.run_local_only(replace(config, rounds=4), tmp_path / "whole")
    assert [run.result["state_sha256"] for run in runs] == [run.result["state_sha256"] for run in whole]


# Checkpoints every N rounds


@pytest.mark.parametrize("changes", [{}, STATEFUL, {"keep_optimizer": True}])
def test_rarer_checkpoints_change_no_bits(toy_config, tmp_path, changes):
    config = toy_config(rounds=7, evaluate_every=2, held_out_share=0.25, **changes)
    train(config, tmp_path / "each")
    rare = replace(config, checkpoint_every=3)
    shown = train(rare, tmp_path / "rare")
    rows = Run.open(tmp_path / "rare").rows
    assert without_clocks(rows) == without_clocks(Run.open(tmp_path / "each").rows)
    assert json.loads(json.dumps(shown)) == rows
    assert sha(tmp_path / "rare") == sha(tmp_path / "each")
    assert rare.sha256 == config.sha256
    memories = [sorted((tmp_path / name).glob("clients/*/*")) for name in ("each", "rare")]
    relative = [[path.relative_to(path.parents[2]) for path in paths] for paths in memories]
    assert relative[0] == relative[1]
    for stopped in range(1, 7):
        out = tmp_path / str(stopped)
        shown = train(rare, out, rounds=stopped)
        assert len(shown) == stopped
        done = int(re.search(r"\d+", Run.open(out).checkpoint().name)[0])
        assert [row["round"] for row in Run.open(out).rows] == list(range(1, done + 1))
        train(replace(rare, checkpoint_every=1 + stopped % 2), out, resume=True)
        assert without_clocks(Run.open(out).rows) == without_clocks(rows)
        assert sha(out) == sha(tmp_path / "each")
        assert_curves_equal_rows(out)


def test_no_row_is_shown_before_its_checkpoint(toy_config, tmp_path):
    checkpoints = []
    config = toy_config(rounds=5, checkpoint_every=2)
    fedray.run(config, tmp_path, on_row=lambda row: checkpoints.append(Run(tmp_path).checkpoint().stem[-1]))
    assert [int(number) for number in checkpoints] == [2, 2, 4, 4, 5]


def test_a_checkpoint_of_a_version_that_had_one_row_in_it(toy_config, tmp_path):
    from safetensors import safe_open

    from fedray import vector
    from fedray.record.checkpoint import KEYS

    config = toy_config()
    train(config, tmp_path / "whole")
    train(config, tmp_path / "run", rounds=2)
    path = Run.open(tmp_path / "run").checkpoint()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, _ = vector.load_checked(path, KEYS)
    (row,) = json.loads(metadata.pop("rows"))
    metadata.pop(vector.CHECKSUM)
    vector.save(path, tensors, {**metadata, "row": json.dumps(row)})
    rows = tmp_path / "run/rounds.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:1]))
    train(config, tmp_path / "run", resume=True)
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    assert [row["round"] for row in Run.open(tmp_path / "run").rows] == [1, 2, 3]
