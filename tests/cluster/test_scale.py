"""Sizes: what a driver holds does not grow with the cohort, and the paper's model travels whole."""

import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import psutil
import pytest
from runs import fit, renew

from fedray.cluster import driver
from fedray.cluster.pool import RayPool
from fedray.data.dataset import Dataset
from fedray.data.partition import IID
from fedray.record.run import Run
from fedray.tasks.ddpm import DDPM

pytestmark = pytest.mark.slow


class PeakPrivateMemory(threading.Thread):
    """The most memory of this process that no other shares (so not the object store), in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self):
        process = psutil.Process()
        while not self.done.wait(0.02):
            self.peak = max(self.peak, process.memory_full_info().uss)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


@pytest.mark.timeout(900)
def test_driver_memory_does_not_grow_with_the_cohort(ray, toy_config, tmp_path):
    """A vector of 16 MB; cohorts of 10 and of 100 clients, of one example and one step each."""
    peaks, pool = {}, None
    try:
        for clients in (10, 10, 100):  # the first warms up
            config = toy_config(
                clients=clients, labels=clients, each=1, size=4_000_000, rounds=1, local_epochs=1, evaluate_samples=0,
                partition=IID(), actors=2,
            )  # fmt: skip
            pool = pool or RayPool.start(config)
            renew(pool, config)
            with PeakPrivateMemory() as memory:
                rows = list(fit(config, pool, tmp_path / str(len(list(tmp_path.iterdir())))))
            assert rows[0]["examples"] == clients
            assert rows[0]["bytes_up"] == clients * 16_000_000
            peaks[clients] = memory.peak
    finally:
        if pool is not None:
            pool.close()
    assert peaks[100] <= 1.1 * peaks[10], peaks


@dataclass(frozen=True)
class GeneratedFaces(DDPM):
    """The paper's network on two images that are generated."""

    name: ClassVar[str] = "generated-faces"

    def check(self, sampler, steps):
        pass

    def dataset(self):
        return Dataset(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8))


@pytest.mark.timeout(900)
def test_one_round_of_the_papers_model(ray, tmp_path):
    """Preset celeba, one step of batch 1 on one actor: 454,692,876 bytes each way."""
    from dataclasses import fields, replace

    from fedray.presets import PRESETS

    celeba = PRESETS["celeba"]
    task = GeneratedFaces(**{field.name: getattr(celeba.task, field.name) for field in fields(DDPM)})
    config = replace(
        celeba, task=task, clients=2, rounds=1, local_epochs=None, local_steps=1, train_batch_size=1,
        evaluate_samples=0, actors=1,
    )  # fmt: skip
    ray.cloudpickle.register_pickle_by_value(__import__("test_scale"))
    run = driver.run(config, tmp_path / "run")
    row = Run.open(tmp_path / "run").rows[0]
    assert [client["bytes_down"] for client in row["clients"]] == [454_692_876] * 2
    assert [client["bytes_up"] for client in row["clients"]] == [454_692_876] * 2
    assert np.isfinite(run.result["loss"])
    weights = tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size > 454_692_876
