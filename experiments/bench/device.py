"""What measures on one GPU: the paper's U-Net on generated images, and a clock that waits for the device."""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

import fedray
from fedray.data.dataset import Dataset
from fedray.tasks.ddpm import DDPM

WARM = 3  # steps before the clock starts


@dataclass(frozen=True)
class Generated(DDPM):
    """A U-Net on images that are generated: their content changes nothing about speed."""

    name: ClassVar[str] = "generated"

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        shape = (512, self.channels, self.resolution, self.resolution)
        return Dataset(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@dataclass(frozen=True)
class Options:
    out: Path = Path("gpu.json")
    """JSON file of all measurements."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to measure."""
    small: bool = False
    """Small shapes and short times: to try the script."""
    budget: float = 235.0
    """Seconds for everything."""
    repeats: int = 3
    """How often each is measured."""
    seconds: float = 0.6
    """How long each repeat takes, about."""


class Bench:
    """Measurements as they are made: lines of a table, and a JSON file."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.cuda = options.device == "cuda"
        self.started = time.perf_counter()
        self.made: dict[str, Any] = {"versions": versions(options), "measurements": [], "skipped": []}
        celeba = fedray.PRESETS["celeba"]
        task = Generated(**{field.name: getattr(celeba.task, field.name) for field in fields(DDPM)})
        if options.small:
            task = replace(task, resolution=16, block_out_channels=(16, 32), attention=(False, True), norm_num_groups=8)
        self.config = replace(
            celeba, task=task, clients=1, rounds=1, local_epochs=None, local_steps=1, evaluate_samples=0, actors=0,
            gpus_per_actor=1.0,
        )  # fmt: skip
        self.task: Any = task
        self.batches = (2, 4) if options.small else (16, 128)
        self.ceiling: float | None = None  # operations a second
        self.operations = 0.0  # of an image
        self.rates: dict[tuple[int, str], float] = {}

    @classmethod
    def start(cls, options: Options) -> "Bench":
        """Begin, and say with what."""
        torch.set_num_threads(1)
        bench = cls(replace(options, seconds=0.05) if options.small else options)
        print(json.dumps(bench.made["versions"]))
        return bench

    def end(self) -> None:
        """Say how long it took, and what was left out."""
        took = time.perf_counter() - self.started
        print(f"\n{took:.0f} s in all; left out: {', '.join(self.made['skipped']) or 'nothing'}")

    def left(self, need: float, what: str) -> bool:
        """Tell whether there are so many seconds left, and say so where there are not."""
        if time.perf_counter() - self.started + (0 if self.options.small else need) < self.options.budget:
            return True
        self.made["skipped"].append(what)
        self.flush()
        print(f"\nLeft out, for lack of time: {what}\n")
        return False

    def add(self, what: str, unit: str, values: list[float], **more: Any) -> None:
        """Keep a measurement, and print its line: median, range, share of the ceiling."""
        at = time.perf_counter() - self.started
        self.made["measurements"].append({"what": what, "unit": unit, "values": values, "at": at, **more})
        self.flush()
        share = ""
        if unit == "images/s" and self.ceiling:
            share = f"{statistics.median(values) * self.operations / self.ceiling:.1%}"
        peak = f"{more['peak_bytes'] / 2**30:.2f}" if more.get("peak_bytes") else ""
        low, high = min(values), max(values)
        print(f"| {what} | {statistics.median(values):.4g} | {low:.4g} to {high:.4g} | {unit} | {share} | {peak} |")

    def flush(self) -> None:
        aside = self.options.out.with_suffix(".aside")
        aside.write_text(json.dumps(self.made, indent=1) + "\n")
        aside.replace(self.options.out)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def fresh(self) -> Iterator[Callable[[], int]]:
        """Give the block unused memory; what is yielded tells the most that it has held, in bytes."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() if self.cuda else 0

    def windows(self, step: Callable[[], Any], seconds: float | None = None) -> list[float]:
        """Return seconds per step, a number per repeat."""
        for _ in range(WARM):
            step()
        self.sync()
        began = time.perf_counter()
        step()
        self.sync()
        seconds = self.options.seconds if seconds is None else seconds
        count = max(1, round(seconds / (time.perf_counter() - began)))
        times = []
        for _ in range(self.options.repeats):
            began = time.perf_counter()
            for _ in range(count):
                step()
            self.sync()
            times.append((time.perf_counter() - began) / count)
        return times


def versions(options: Options) -> dict[str, Any]:
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "torch": torch.__version__, "diffusers": version("diffusers"), "ray": version("ray"),
        "cudnn": torch.backends.cudnn.version() if cuda else None, "python": sys.version.split()[0],
        "cpus": os.cpu_count(), "options": {key: str(value) for key, value in vars(options).items()},
    }  # fmt: skip
