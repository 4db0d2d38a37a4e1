"""Run directories that were damaged, moved, linked, made read-only or begun twice."""

import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import fit, sha, train

from fedray.cli import main
from fedray.errors import UserError
from fedray.federation.pool import LocalPool
from fedray.record.run import Run
from fedray.vector import sha256

SHORT = "--rounds 2 --local-steps 1 --evaluate-samples 0 --clients 2 --fraction 0.5 --actors 0 --keep-optimizer"
CUTS = [*range(10)]


def cut(path, tenths):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])


def flip(path, tenths):
    content = bytearray(path.read_bytes())
    content[len(content) * tenths // 10] ^= 16
    path.write_bytes(content)


def empty(path, _):
    path.write_bytes(bytes(path.stat().st_size))


# The checkpoint and the memories before


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with kept optimizers that was stopped after three of four rounds and keeps two checkpoints; and its end."""
    import toy

    from fedray.config import Config
    from fedray.data.partition import ByLabel

    config = Config(
        task=toy.Toy(labels=5), clients=5, partition=ByLabel(), rounds=4, local_epochs=2, train_batch_size=3,
        learning_rate=0.1, evaluate_samples=0, actors=0, keep_optimizer=True, fraction=0.6, checkpoints_total_limit=2,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("damage")
    train(config, out / "stopped", rounds=3)
    train(config, out / "whole")
    return config, out / "stopped", sha(out / "whole"), Run.open(out / "whole").rows


@pytest.fixture
def stopped(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run")


def last_checkpoint(run):
    return Run.open(run).checkpoint()


def newest_memory(run):
    return max(run.glob("clients/*/*.safetensors"), key=lambda path: path.name)


@pytest.mark.parametrize("which", [last_checkpoint, newest_memory])
@pytest.mark.parametrize(("damage", "tenths"), [*((cut, n) for n in CUTS), (flip, 1), (flip, 5), (flip, 9), (empty, 0)])
def test_the_checkpoint_before_a_damaged_one_is_used_and_that_is_said(made, stopped, which, damage, tenths):
    config, _, expected, whole = made
    path = which(stopped)
    assert int(path.stem.removeprefix("round-")) == 3
    damage(path, tenths)
    (third, _) = train(config, stopped, resume=True)
    assert sha(stopped) == expected
    assert str(path) in third["gone_back"]
    assert third["gone_back"].endswith("Gone back to the checkpoint after round 2.")
    rows = Run.open(stopped).rows
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert ["gone_back" in row for row in rows] == [False, False, True, False]


def test_all_memories_that_a_kept_checkpoint_needs_are_kept(made):
    run = Run.open(made[1])
    kept = sorted(int(path.stem.removeprefix("round-")) for path in run.directory.glob("checkpoints/*"))
    assert kept == [2, 3]
    for client in range(5):
        last = [max((row["round"] for row in run.rows[:n] if client in row["cohort"]), default=None) for n in kept]
        there = sorted(int(path.stem) for path in run.directory.glob(f"clients/{client:06d}/*"))
        assert there == sorted({generation for generation in last if generation is not None}), client


@pytest.mark.parametrize(("damage", "tenths"), [(cut, 5), (flip, 9), (empty, 0)])
def test_a_damaged_memory_is_named_where_no_checkpoint_before_it_is_kept(made, tmp_path, damage, tenths):
    """As `--checkpoints-total-limit` 1 has it, the default: nothing is trained, and nothing is written."""
    config, run = replace(made[0], checkpoints_total_limit=1), tmp_path / "run"
    train(config, run, rounds=3)
    assert [path.stem for path in run.glob("checkpoints/*")] == ["round-000003"]
    path = newest_memory(run)
    right, rows = path.read_bytes(), (run / "rounds.jsonl").read_bytes()
    damage(path, tenths)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        train(config, run, resume=True)
    assert (run / "rounds.jsonl").read_bytes() == rows
    path.write_bytes(right)
    train(config, run, resume=True)
    assert sha(run) == made[2]


def test_where_every_checkpoint_is_damaged_the_last_is_named(made, stopped):
    for path in stopped.glob("checkpoints/*"):
        cut(path, 5)
    with pytest.raises(UserError, match="round-000003.safetensors is damaged"):
        train(made[0], stopped, resume=True)
    assert len(list(stopped.glob("checkpoints/*"))) == 2
    assert (stopped / "rounds.jsonl").read_bytes() == (made[1] / "rounds.jsonl").read_bytes()


# What commands say


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run whose last act is missing: its result."""
    out = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", *SHORT.split(), "--out", str(out)]) == 0
    (out / "result.json").unlink()
    return out


@pytest.fixture
def run(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "run")


def told(capsys, *command):
    """The exit code of a command and what it says, which is a sentence."""
    capsys.readouterr()
    code = main(list(map(str, command)))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoints/round-000002.safetensors", "rounds.jsonl", "config.json"])
def test_a_file_that_is_cut_anywhere_is_named(run, name, capsys):
    content = (run / name).read_bytes()
    for tenths in CUTS:
        (run / name).write_bytes(content[: len(content) * tenths // 10])
        code, said = told(capsys, "train", "--resume", run, "--actors", "0")
        # The last row is in the checkpoint too.
        if code == 0:
            assert name == "rounds.jsonl"
            assert len(Run.open(run).rows) == 2
            (run / "result.json").unlink()
        else:
            assert code == 2
            assert Path(name).name in said, tenths
            assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rounds.jsonl", b"\xff\xfe\x00{}\n", "is no text in UTF-8 (invalid start byte at byte 0)"),
        ("rounds.jsonl", b'{"loss": 1}\n{"round": 2}\n', "is damaged at line 1: it is no row of a round"),
        ("rounds.jsonl", b'{"round": 1}\n{"round": "2"}\n', "is damaged at line 2: it is no row of a round"),
        ("rounds.jsonl", b"[]\n7\n", "is damaged at line 1: it is no row of a round"),
        ("rounds.jsonl", b'{"round": 1}\n' + b"[" * 100_000 + b"\n", "is damaged at line 2"),
        ("rounds.jsonl", bytes(400), "does not have a row for each of the 2 complete rounds"),
        ("config.json", b"\xe4\xf6\xfc", "is no text in UTF-8"),
        ("config.json", b"[1, 2]", "is damaged: it holds no JSON object"),
        ("config.json", b"[" * 100_000, "is damaged: its lists lie in each other too deep"),
        ("config.json", b'{"config": 7}', "is damaged"),
        ("config.json", b'{"config": {}}', "is damaged"),
        ("config.json", b'{"config": {"algorithm": 7, "task": 3}}', "is damaged"),
        ("config.json", b"", "is damaged at line 1"),
    ],
)
def test_a_file_with_other_contents_is_named(run, name, content, said, capsys):
    (run / name).write_bytes(content)
    code, words = told(capsys, "train", "--resume", run, "--actors", "0")
    assert code == 2
    assert name in words
    assert said in words


def test_a_pipe_in_place_of_rows_is_not_waited_for(run, capsys):
    (run / "rounds.jsonl").unlink()
    os.mkfifo(run / "rounds.jsonl")
    code, said = told(capsys, "train", "--resume", run, "--actors", "0")
    assert code == 2
    assert "rounds.jsonl is a named pipe, where a file should be" in said


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b""])
def test_a_damaged_result_is_named_and_written_anew_once_it_is_removed(run, content, capsys):
    (run / "result.json").write_bytes(content)
    code, said = told(capsys, "train", "--resume", run, "--actors", "0")
    assert code == 2
    assert "result.json is" in said
    (run / "result.json").unlink()
    assert told(capsys, "train", "--resume", run, "--actors", "0")[0] == 0


def test_sampling_goes_back_too_and_says_so(run, tmp_path, capsys):
    (last,) = run.glob("checkpoints/*")
    shutil.copy(last, last.with_name("round-000001.safetensors"))
    cut(last, 5)
    code, said = told(capsys, "sample", run, "--num-images", "1", "--sampling-steps", "1", "--out", tmp_path / "a.png")
    assert code == 0
    assert "round-000002.safetensors is damaged" in said
    assert "Gone back to the checkpoint after round" in said


def test_a_run_that_was_moved_goes_on(made, stopped, tmp_path):
    moved = tmp_path / "some" / "where else"
    moved.parent.mkdir()
    shutil.move(stopped, moved)
    train(made[0], moved, resume=True)
    assert sha(moved) == made[2]


def in_another_process(work, as_nobody=False):
    """Do `work` in a child, and return what it says of the exception, or "done"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if as_nobody:
                os.setuid(65534)
            work()
            said = "done"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def test_a_run_is_not_written_into_rays_copy_of_a_working_directory(toy_config, tmp_path, monkeypatch):
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="give an absolute --out"):
        train(toy_config(), Path("runs/x"))
    assert not list(copy.iterdir())
    train(toy_config(rounds=1), tmp_path / "runs/x")


def test_a_directory_that_may_not_be_written(made):
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others
        os.chmod(place, 0o755)
        out = shutil.copytree(made[1], Path(place, "run"))
        for path in [out, *out.rglob("*")]:
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        as_nobody = os.geteuid() == 0  # root may write everywhere
        said = in_another_process(lambda: train(made[0], out, resume=True), as_nobody)
        assert said == f"UserError: {out} cannot be written: Permission denied; choose another --out."
        said = in_another_process(lambda: train(made[0], Path(place, "new")), as_nobody)
        if as_nobody:
            assert said.startswith(f"UserError: {place}/new cannot be written: Permission denied")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        for path in [out, *out.rglob("*")]:
            os.chmod(path, 0o755)


# Two at once


def begin(config, out, barrier, answers):
    """Begin a run, at the same time as another process: both have seen that the directory is vacant."""
    import fedray.federation.fit as module

    right = module.look_at_a_sample

    def look(session):
        right(session)
        barrier.wait()

    module.look_at_a_sample = look
    try:
        train(config, out)
        answers.put(("finished", config.seed))
    except UserError as error:
        answers.put((str(error), config.seed))


def test_of_two_starts_in_one_directory_one_goes_on(toy_config, tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        out, barrier, answers = tmp_path / f"run-{attempt}", context.Barrier(2), context.Queue()
        configs = [toy_config(seed=seed, rounds=2) for seed in (0, 1)]
        children = [context.Process(target=begin, args=(each, out, barrier, answers)) for each in configs]
        for child in children:
            child.start()
        said = sorted((answers.get(timeout=60) for _ in children), key=lambda answer: answer[0] != "finished")
        for child in children:
            child.join(60)
        assert said[0][0] == "finished"
        assert "holds another run; choose another --out" in said[1][0]
        winner = said[0][1]
        assert json.loads((out / "config.json").read_text())["config"]["seed"] == winner
        train(configs[winner], tmp_path / f"alone-{attempt}")
        assert sha(out) == sha(tmp_path / f"alone-{attempt}")


def test_a_second_process_waits_and_then_says_who_writes(toy_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fedray.record.run.PATIENCE", 0.3)
    config = toy_config()
    rows = fit(config, LocalPool(config), tmp_path / "run")
    next(rows)
    began = time.monotonic()
    with pytest.raises(UserError, match="is being written by another process; wait for it"):
        train(config, tmp_path / "run", resume=True)
    assert time.monotonic() - began >= 0.3
    rows.close()
    train(config, tmp_path / "run", resume=True)


# Links


def test_links_to_files_are_replaced_and_not_followed(made, stopped, tmp_path, toy_config):
    config = replace(made[0], evaluate_samples=4)
    saved = json.loads((stopped / "config.json").read_text())
    saved["config"]["evaluate_samples"] = 4
    (stopped / "config.json").write_text(json.dumps(saved))
    names = ["samples.png", "partition.png", "partition.csv", "result.json", "rounds.jsonl", "nearest.png"]
    rows = (stopped / "rounds.jsonl").read_bytes()
    for name in names:
        (stopped / name).unlink(missing_ok=True)
        if name != "result.json":
            (tmp_path / f"precious-{name}").write_bytes(rows if name == "rounds.jsonl" else b"keep me")
        (stopped / name).symlink_to(tmp_path / f"precious-{name}")
    (stopped / "partition.csv").unlink()
    (stopped / "model").symlink_to(tmp_path / "nowhere")
    train(config, stopped, resume=True)
    for name in names:
        if name not in ("partition.csv", "result.json"):
            assert (tmp_path / f"precious-{name}").read_bytes() == (rows if name == "rounds.jsonl" else b"keep me")
    for name in ("result.json", "nowhere"):
        assert not (tmp_path / f"precious-{name}").exists()
    assert not (tmp_path / "nowhere").exists()
    assert Image.open(stopped / "samples.png").size[0] > 0
    for name in ("samples.png", "partition.png", "result.json", "rounds.jsonl", "model"):
        assert not (stopped / name).is_symlink(), name
    assert len(Run.open(stopped).rows) == 4


def test_rows_are_not_appended_through_a_link_to_what_is_not_there(toy_config, tmp_path):
    config = toy_config(evaluate_samples=0)
    rows = fit(config, LocalPool(config), tmp_path / "run")
    next(rows)
    (tmp_path / "run/rounds.jsonl").unlink()
    (tmp_path / "run/rounds.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Exception, match="symbolic links"):
        list(rows)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["samples", "model", "checkpoints", "clients/000001"])
def test_a_link_to_a_folder_is_refused(made, stopped, tmp_path, name):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/000001.safetensors").write_text("keep me")
    shutil.rmtree(stopped / name, ignore_errors=True)
    (stopped / name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=f"{name} is a link, which a run does not write through"):
        train(made[0], stopped, resume=True)
    assert [path.read_text() for path in (tmp_path / "precious").iterdir()] == ["keep me"]


# What is delivered


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_result_has_the_hashes_of_the_model_and_of_what_is_delivered(toy_config, tmp_path, use_ema):
    config = toy_config(use_ema=use_ema)
    rows = train(config, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    saved = torch.load(tmp_path / "run/model/network.pt", weights_only=True)["weight"].flatten()
    result = run.result
    assert result["delivered_sha256"] == sha256(saved)
    assert result["delivers"] == ("average" if use_ema else "model")
    assert rows[-1]["evaluation"]["of"] == result["delivers"]
    assert (result["vector_sha256"] == result["delivered_sha256"]) == (not use_ema)
    assert result["delivered_sha256"] in (tmp_path / "run/model/README.md").read_text()
