"""How long do rounds take with several actors on one GPU, with the Multi-Process Service and without?

    python experiments/bench/gpu_rounds.py --out gpu-rounds.json
    python experiments/bench/gpu_rounds.py --small --device cpu     # tries the script, on a machine without a GPU

Rounds of the preset digits, whose network is small, and of the paper's U-Net on generated images, by 1 to 8 actors that
share a GPU, and by one process without Ray that trains its clients in turn; checkpoint included, without the first
round. The models of each must be the same, to the bit: the JSON file has their SHA-256.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
import tyro
from device import Bench, Options

import fedray
from fedray.config import Config
from fedray.record.run import Run


class GPUMemory(threading.Thread):
    """The most memory of the GPU that all processes hold together beyond what is held now, in bytes."""

    def __init__(self, cuda: bool) -> None:
        super().__init__(daemon=True)
        self.cuda, self.peak, self.done = cuda, 0, threading.Event()
        self.before = self.held()

    def held(self) -> int:
        free, total = torch.cuda.mem_get_info() if self.cuda else (0, 0)
        return total - free

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, self.held() - self.before)

    def __enter__(self) -> "GPUMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def measure_rounds(bench: Bench, what: str, config: Config, actors: int, need: float) -> None:
    """Time whole rounds, checkpoint included, without the first."""
    what = f"{what}, {actors} actors" if actors else f"{what}, in one process without Ray"
    if not bench.left(need, what):
        return
    share = 1 / max(1, actors) if bench.cuda else 0.0
    config = replace(config, actors=actors, gpus_per_actor=share, cpus_per_actor=1.0)
    began = time.perf_counter()
    with bench.fresh(), tempfile.TemporaryDirectory() as folder, GPUMemory(bench.cuda) as memory:
        rows = fedray.run(config, Path(folder) / "run").rows
        digest = Run.open(Path(folder) / "run").result
    assert digest is not None
    seconds = [row["seconds"]["round"] + row["seconds"]["save"] for row in rows[1:]]
    clients = [{client["client"]: client["seconds"] for client in row["clients"]} for row in rows]
    bench.add(
        what, "s/round", seconds, peak_bytes=memory.peak, whole=time.perf_counter() - began, clients=clients,
        phases=[row["seconds"] for row in rows], sha256=digest["vector_sha256"],
    )  # fmt: skip


@contextmanager
def mps(wanted: bool) -> Iterator[bool]:
    """Have NVIDIA's Multi-Process Service run the processes of a block together; tells whether there is one."""
    if not wanted or shutil.which("nvidia-cuda-mps-control") is None:
        yield False
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = os.environ["CUDA_MPS_LOG_DIRECTORY"] = folder
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield True
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False)
            del os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"]


def by_actors(bench: Bench, what: str, config: Config, numbers: tuple[int, ...], need: float) -> None:
    """Time rounds of several numbers of actors in a private Ray."""
    ray.init(
        address="local", num_cpus=max(8, os.cpu_count() or 8), include_dashboard=False, namespace="fedray",
        log_to_driver=False, logging_level="ERROR", object_store_memory=300_000_000 if bench.options.small else 8 << 30,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    try:
        for actors in numbers:
            measure_rounds(bench, what, config, actors, need)
    finally:
        ray.shutdown()


def main(options: Options) -> None:
    """Measure."""
    bench, small = Bench.start(options), options.small
    digits = replace(
        fedray.PRESETS["digits"], clients=8, rounds=2 if small else 4, evaluate_samples=0, features=None,
        local_epochs=None, local_steps=2 if small else 30,
    )  # fmt: skip
    faces = replace(
        bench.config, clients=4, rounds=2 if small else 3, local_steps=2 if small else 8, train_batch_size=16,
        mixed_precision="bf16",
    )  # fmt: skip
    what = "digits, 8 clients of 30 steps of 32"
    print("\n| what | median | range | unit | | GiB |\n|---|---|---|---|---|---|")
    by_actors(bench, what, digits, (1, 8, 4, 2), 15)
    with mps(bench.cuda) as shared:
        if shared:
            by_actors(bench, f"{what}, MPS", digits, (8, 4, 2), 15)
        else:
            print("\nLeft out: there is no nvidia-cuda-mps-control\n")
    measure_rounds(bench, what, digits, 0, 15)  # this process then holds a part of the GPU
    by_actors(bench, "celeba, bf16, 4 clients of 8 steps of 16", faces, (1, 4), 25)
    bench.end()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
