"""On a GPU the bits may differ from the CPU's; what must hold is that the same things are learned."""

from dataclasses import replace

import pytest
import torch
from runs import train

from fedray.cluster import driver
from fedray.presets import PRESETS

pytestmark = pytest.mark.gpu

CONFIG = replace(PRESETS["digits"], rounds=2, local_epochs=1, evaluate_samples=16, sampling_steps=10)


def test_a_gpu_trains_what_a_cpu_trains(tmp_path):
    losses = {}
    for gpus in (0.0, 1.0):
        config = replace(CONFIG, actors=0, gpus_per_actor=gpus)
        losses[gpus] = [row["loss"] for row in train(config, tmp_path / str(gpus))]
    assert losses[1.0] == pytest.approx(losses[0.0], rel=0.02)
    assert torch.cuda.max_memory_allocated() > 0


def test_two_actors_share_a_gpu(ray, tmp_path):
    run = driver.run(replace(CONFIG, actors=2, gpus_per_actor=0.5), tmp_path / "run")
    assert {client["actor"] for client in run.rows[0]["clients"]} == {"actor 0", "actor 1"}
    assert {client["outcome"] for row in run.rows for client in row["clients"]} == {"ok"}
