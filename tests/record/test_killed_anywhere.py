"""Killed before anything is written, renamed, removed or folded, and resumed: the same bits, rows and curves, no file
left over, no memory read twice or lost."""

import itertools
import os
import sys
import threading
import traceback

import pytest
import safetensors.torch
import torch
from runs import assert_curves_equal_rows, sha, train

from fedray.federation.plan import make_plan
from fedray.record.run import Run
from fedray.vector import sha256_of

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")  # of a directory, as Python audits them
KINDS = {"open", "os.mkdir", "os.rename", "os.remove", "fsync", "save_file", "add", "merge", "result", "append"}
METRICS = {"brightness": lambda samples, images: float(samples.mean())}


def killed_before(point, config, out):
    """Train in a child process that ends before that point, as by SIGKILL. Returns what it was about to do, or ""."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count_points(point, config, out, writing)
            train(config, out, metrics=METRICS)
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9), told
    return told


def count_points(point, config, out, telling):
    """Have this process end before the point of that number: two threads come to them, so one number counts once."""
    lock, seen = threading.Lock(), itertools.count()

    def reached(what):
        with lock:
            if next(seen) == point:
                os.write(telling, what.encode())
                os._exit(9)

    def audited(event, arguments):
        changes = event in CHANGES or (event == "open" and arguments[2] & WRITES)
        if changes and str(arguments[0]).startswith(str(out)):
            reached(f"{event} {arguments[0]}")

    def announced(where, name):
        right = getattr(where, name)

        def announce(*arguments, **named):
            reached(name)
            return right(*arguments, **named)

        setattr(where, name, announce)

    sys.addaudithook(audited)
    announced(os, "fsync")
    announced(safetensors.torch, "save_file")
    announced(Run, "append")
    for name in ("add", "merge", "result"):
        announced(type(config.fold), name)


def memories(run, clients):
    kept = {client: run.recall(client, run.generation(client, 99)) for client in range(clients)}
    return sha256_of({f"{client}/{name}": tensor for client, each in kept.items() for name, tensor in each.items()})


def left_in(out):
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if "tensorboard" not in path.parts}


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_killed_before_any_write_and_resumed(toy_config, tmp_path, every):
    """An average of SCAFFOLD on a wire with error feedback: the server, each client and each link remember."""
    config = toy_config(
        labels=5, fraction=0.6, rounds=3, learning_rate=0.05, evaluate_samples=4, optimizer="sgd",
        algorithm="ema:0.9:scaffold", wire="feedback:topk:0.5", checkpoint_every=every,
    )  # fmt: skip
    train(config, tmp_path / "whole", metrics=METRICS)
    whole = Run.open(tmp_path / "whole")
    expected, kinds = memories(whole, 5), set()
    for point in itertools.count():
        out = tmp_path / str(point)
        told = killed_before(point, config, out)
        if not told:
            break
        about = f"{point}: {told}"
        kinds.add(told.split()[0])
        train(config, out, resume=(out / "config.json").exists(), metrics=METRICS)  # else killed before there was a run
        run = Run.open(out)
        assert sha(out) == sha(tmp_path / "whole"), about
        assert memories(run, 5) == expected, about
        assert_curves_equal_rows(out)
        for name in ("loss", "scores", "cohort"):
            assert [row[name] for row in run.rows] == [row[name] for row in whole.rows], about
        assert run.result["scores"] == whole.result["scores"], about
        assert left_in(out) <= left_in(tmp_path / "whole"), about
        control = run.state(make_plan(config).layout).tensors["control"]
        own = [run.recall(client, run.generation(client, 9)).get("algorithm/control") for client in range(5)]
        mean = torch.stack([torch.zeros(16) if each is None else each for each in own]).mean(0)
        torch.testing.assert_close(control, mean, rtol=1e-5, atol=1e-6)
    assert kinds >= KINDS
    assert point > 100
