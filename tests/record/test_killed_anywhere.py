"""Killed before any write, and resumed: the same bits, no memory read twice or lost, nothing left over."""

import os
from pathlib import Path

import pytest
import torch
from runs import assert_curves_equal_rows, sha, train

from fedray.federation.plan import make_plan
from fedray.record.run import Run
from fedray.vector import sha256_of


def killed_before(point, config, out):
    """Train in a child process that ends before that flush or rename, as by SIGKILL. Returns whether it came to it."""
    child = os.fork()
    if child == 0:
        seen = 0

        def counted(right):
            def count(*arguments, **named):
                nonlocal seen
                if seen == point:
                    os._exit(9)
                seen += 1
                return right(*arguments, **named)

            return count

        try:
            os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
            train(config, out)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 9


def memories(run, clients):
    kept = {client: run.recall(client, run.generation(client, 99)) for client in range(clients)}
    return sha256_of({f"{client}/{name}": tensor for client, each in kept.items() for name, tensor in each.items()})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [1, 2])
def test_killed_before_any_write_and_resumed(toy_config, tmp_path, every):
    """An average of SCAFFOLD on a wire with error feedback: the server, each client and each link remember."""
    config = toy_config(
        labels=5, fraction=0.6, rounds=3, learning_rate=0.05, evaluate_samples=0, optimizer="sgd",
        algorithm="ema:0.9:scaffold", wire="feedback:topk:0.5", checkpoint_every=every,
    )  # fmt: skip
    train(config, tmp_path / "whole")
    whole = Run.open(tmp_path / "whole")
    expected = memories(whole, 5)
    point = 0
    while killed_before(point, config, out := tmp_path / str(point)):
        train(config, out, resume=(out / "config.json").exists())  # else killed before there was a run
        run = Run.open(out)
        assert sha(out) == sha(tmp_path / "whole"), point
        assert memories(run, 5) == expected, point
        assert_curves_equal_rows(out)
        assert [row["loss"] for row in run.rows] == [row["loss"] for row in whole.rows], point
        names = {path.relative_to(out).as_posix() for path in out.rglob("*") if "tensorboard" not in path.parts}
        left = {path.relative_to(whole.directory).as_posix() for path in whole.directory.rglob("*")}
        assert names <= left, point
        control = run.state(make_plan(config).layout).tensors["control"]
        own = [run.recall(client, run.generation(client, 9)).get("algorithm/control") for client in range(5)]
        mean = torch.stack([torch.zeros(16) if each is None else each for each in own]).mean(0)
        torch.testing.assert_close(control, mean, rtol=1e-5, atol=1e-6)
        point += 1
    assert point > 15
