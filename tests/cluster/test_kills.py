"""Real kills, by SIGKILL at random moments: every round has its whole cohort, and the bits are undisturbed."""

import random
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from killing import OnePerRound
from runs import CHAOS, sha, train

import fedray
from fedray.cli import main
from fedray.record.run import Run

pytestmark = pytest.mark.slow
SEEDS = range(10 if CHAOS else 1)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", SEEDS)
def test_one_of_two_actors_is_killed_in_every_round(ray, toy_config, tmp_path, seed):
    rounds = 5 if CHAOS else 3
    settings = {"labels": 20, "local_epochs": 1, "train_batch_size": 8, "rounds": rounds, "evaluate_samples": 0}
    settings |= {"keep_optimizer": True}
    train(toy_config(**settings), tmp_path / "quiet")
    config = toy_config(**settings, slow=tuple(range(20)), pause=0.2, actors=2)
    with OnePerRound(tmp_path / "run", rounds, seed) as killer:
        run = fedray.run(config, tmp_path / "run")
    assert run.result["state_sha256"] == sha(tmp_path / "quiet")
    assert len(set(killer.killed)) == rounds  # so each was replaced
    for row in run.rows:
        assert [client["outcome"] for client in row["clients"]] == ["ok"] * 20
        assert {loss["cause"] for loss in row["lost"]} == {"actor died"}


RUNS = {
    "digits": "train --preset digits --rounds 6 --local-steps 3 --evaluate-samples 8 --sampling-steps 4 --use-ema "
    "--keep-optimizer --kid-subset-size 4",
    "lora": "finetune --preset digits-lora --rounds 4 --local-steps 2 --evaluate-samples 0 --validation-rounds 4 "
    "--algorithm flora --no-keep-optimizer",
}


@pytest.mark.chaos
@pytest.mark.skipif(not CHAOS, reason="takes minutes: make chaos")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "seed"), [*(("digits", seed) for seed in range(9)), ("lora", 9)])
def test_all_processes_of_a_run_are_killed_at_random_moments(photos, tmp_path, name, seed):
    """Three times, while it starts, trains or saves; then it is resumed, and ends."""
    rng, out = random.Random(seed), tmp_path / "run"
    command = RUNS[name].split() + ["--train-data-dir", str(photos)] * (name == "lora")
    assert main([*command, "--actors", "0", "--out", str(tmp_path / "quiet")]) == 0
    for _ in range(3):
        process = begin_or_resume(command, out)
        rows, patience = len(Run(out).rows), time.monotonic() + rng.uniform(0, 60)
        while len(Run(out).rows) == rows and time.monotonic() < patience:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 2))  # so after a round, or before there is one
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
    assert begin_or_resume(command, out).wait(600) == 0
    whole, quiet = Run.open(out), Run.open(tmp_path / "quiet")
    assert whole.result["state_sha256"] == quiet.result["state_sha256"]
    assert whole.result["scores"] == quiet.result["scores"]
    assert [row["loss"] for row in whole.rows] == [row["loss"] for row in quiet.rows]
    shown = {"tensorboard", "logs"}  # the undisturbed run had no actors
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if not shown & {*path.parts}}
    assert names <= {path.relative_to(quiet.directory).as_posix() for path in quiet.directory.rglob("*")}


def begin_or_resume(command, out):
    """Start a run, on a Ray of its own, or resume it if it was begun."""
    begun = (out / "config.json").exists()
    resume = [command[0], "--resume", str(out)]
    arguments = resume if begun else [*command, "--actors", "2", "--cpus-per-actor", "0.5", "--out", str(out)]
    return subprocess.Popen([sys.executable, "-m", "fedray", *arguments])
