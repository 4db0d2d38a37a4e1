"""The same bits wherever a run is placed, by the command line as users type it."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CHAOS, fit

import fedray
from fedray.cli import main
from fedray.cluster.nodes import count_actors
from fedray.cluster.pool import RayPool
from fedray.errors import RunError, UserError
from fedray.federation.evaluation import sample
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import model as model_of
from fedray.record.run import Run

TRAIN = "train --preset digits --clients 4 --rounds 2 --local-epochs 1 --evaluate-samples 8 --sampling-steps 5"


def train(out, flags):
    assert main([*TRAIN.split(), "--out", str(out), *flags.split()]) == 0
    return Run.open(out).result["vector_sha256"], (out / "samples.png").read_bytes()


PLAIN = "--no-keep-optimizer --no-use-ema"
MANY = "--keep-optimizer --fraction 0.5 --clients 8 --codec float16"


TWO, FOUR = "--actors 2", "--actors 4 --cpus-per-actor 0.5"


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(("flags", "places"), [(PLAIN, [FOUR]), (MANY, [TWO])], ids=["plain", "kept-fraction-float16"])
def test_placement_never_matters(ray, tmp_path, flags, places):
    """In `make chaos` each on two actors and on four."""
    here = train(tmp_path / "here", f"{flags} --actors 0")
    for index, place in enumerate([TWO, FOUR] if CHAOS else places):
        assert train(tmp_path / str(index), f"{flags} {place}") == here


@pytest.mark.slow
def test_nor_does_it_on_two_threads(ray, tmp_path):
    flags = "--rounds 1 --cpus-per-actor 2"
    assert train(tmp_path / "1", f"{flags} --actors 1") == train(tmp_path / "0", f"{flags} --actors 0")


@pytest.mark.slow
def test_stopped_here_and_resumed_there(ray, toy_config, tmp_path):
    """There, two actors share the clients: each takes seconds."""
    gate = tmp_path / "gate"
    settings = {"keep_optimizer": True, "use_ema": True, "local_epochs": 1, "slow": (0, 1, 2, 3), "gate": str(gate)}
    config = toy_config(**settings)
    whole = fedray.run(config, tmp_path / "whole").result["vector_sha256"]
    rounds = fit(config, LocalPool(config), tmp_path / "run")
    next(rounds)
    rounds.close()
    gate.touch()
    rows, moved = [], toy_config(**settings, actors=2, cpus_per_actor=0.5)
    resumed = fedray.run(moved, tmp_path / "run", resume=True, on_row=rows.append)
    assert [row["round"] for row in rows] == [2, 3]
    assert resumed.result["vector_sha256"] == whole
    assert {client["actor"] for row in rows for client in row["clients"]} == {"actor 0", "actor 1"}


@pytest.mark.slow
def test_samples_do_not_depend_on_the_pool(ray, toy_config):
    config = toy_config(eval_batch_size=3)
    model, sampling = model_of({"model": torch.linspace(0, 1, 16)}), replace(Sampling.of(config, 10), seed=4)
    here = sample(LocalPool(config), model, sampling)[1]
    pool = RayPool.start(toy_config(eval_batch_size=3, actors=2))
    try:
        there = sample(pool, model, sampling)[1]
    finally:
        pool.close()
    assert here.shape == (10, 1, 2, 2)
    assert np.array_equal(here, there)
    assert not np.array_equal(here, sample(LocalPool(config), model, replace(sampling, seed=5))[1])


@pytest.mark.slow
def test_errors_of_the_driver_reach_the_caller(ray, toy_config, tmp_path):
    for resume in (False, True):
        with pytest.raises(RunError, match="no client returned a model. Client 0: ValueError"):
            fedray.run(toy_config(failing=(0, 1, 2, 3), actors=1), tmp_path / "run", resume=resume)
    with pytest.raises(UserError, match="only 32 examples"):
        fedray.run(toy_config(clients=40, actors=1), tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_more_actors_than_the_machine_has(ray, toy_config, tmp_path):
    with pytest.raises(UserError, match=r"--actors 3 needs 3 CPUs, and there are 2 CPUs and 0 GPUs: at most 2 fit"):
        fedray.run(toy_config(actors=3), tmp_path / "run")
    with pytest.raises(UserError, match="no GPU"):
        fedray.run(toy_config(actors=1, gpus_per_actor=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert count_actors(toy_config(actors=None)) == 2
    assert count_actors(toy_config(actors=None, cpus_per_actor=0.25)) == 4  # never more than the cohort


@pytest.mark.slow
def test_the_driver_outlives_its_caller_and_can_be_attached_to(ray, tmp_path, capsys, monkeypatch):
    """On a running cluster, SIGKILL the process that started a run: it goes on, and --resume shows its end."""
    address, toy, gate = ray.get_runtime_context().gcs_address, Path(__file__).parents[1] / "toy.py", tmp_path / "gate"
    gate.touch()
    flags = f"--task {toy}:Toy --partition by-label --local-steps 2 --features None --evaluate-samples 0 --rounds 12"
    command = ["train", *flags.split(), *f"--slow 0 1 2 3 --pause 0.2 --gate {gate} --out".split()]
    run = tmp_path / "run"
    begin = [sys.executable, "-m", "fedray", *command, str(run), "--actors", "1", "--address", address]
    caller = subprocess.Popen(begin, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (run / "rounds.jsonl").exists():
        assert time.monotonic() < deadline
        assert caller.poll() is None
        time.sleep(0.1)
    os.killpg(caller.pid, signal.SIGKILL)
    caller.wait()
    before = len(Run.open(run).rows)
    assert before < 12
    assert main(["runs", str(run / "checkpoints"), "--address", "auto"]) == 0  # a folder without runs
    assert re.search(r"run .* goes on: ", capsys.readouterr().out)
    with monkeypatch.context() as context:  # as where another node has not yet seen what is in the directory
        context.setattr(Run, "check_vacant", lambda self: None)
        assert main([*command, str(run), "--actors", "1"]) == 2
    assert "is still going on this cluster" in capsys.readouterr().err
    gate.unlink()
    assert main(["train", "--resume", str(run), "--code", str(toy)]) == 0
    resumed = Run.open(run)
    assert len({row["round"] for row in resumed.rows}) == len(resumed.rows) == 12
    assert main([*command, str(tmp_path / "whole"), "--actors", "0"]) == 0
    assert resumed.result["vector_sha256"] == Run.open(tmp_path / "whole").result["vector_sha256"]


@pytest.mark.slow
def test_a_task_that_the_driver_cannot_import_is_told_at_once(ray, toy_config, tmp_path, monkeypatch):
    (tmp_path / "hidden_task.py").write_text("import toy\nclass Hidden(toy.Toy):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import hidden_task

    config = replace(toy_config(actors=1), task=hidden_task.Hidden())
    with pytest.raises(RunError, match="could not begin: .*hidden_task"):
        fedray.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = fedray.run(toy_config(actors=1), tmp_path / "run")  # the directory is free
    assert run.result["rounds"] == 3
    assert run.saved["command"] == sys.argv  # the user's, not the driver actor's
