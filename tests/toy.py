"""A task of a few numbers, for tests of the federation: client k can be told to fail, to return NaN …"""

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedray.data.dataset import Dataset
from fedray.vector import FlatParameters
from fedray.vector.adapters import adapters


@dataclass(frozen=True)
class Toy:
    """Pulls a vector towards the mean of a client's labels. With partition by-label, client k holds label k."""

    name: ClassVar[str] = "toy"
    offers: ClassVar[frozenset[str]] = frozenset({"labels"})
    labels: int = 4
    each: int = 8
    size: int = 16
    layers: int | None = None
    failing: tuple[int, ...] = ()
    infinite: tuple[int, ...] = ()
    undefined: tuple[int, ...] = ()  # their loss is NaN
    slow: tuple[int, ...] = ()
    pause: float = 0.5  # seconds of a slow one's batch
    gate: str = ""  # if given, they are slow for as long as this file exists
    hungry: tuple[int, ...] = ()
    greedy: tuple[int, ...] = ()  # takes memory of its machine
    greed: int = 0  # bytes of it, a batch
    crowded: tuple[int, ...] = ()  # out of memory in an actor that has less than two CPUs
    breaking: tuple[int, ...] = ()  # the first to be trained in a process breaks it, for all that come after
    deadly: tuple[int, ...] = ()
    crashing: tuple[int, ...] = ()  # by a segmentation fault
    hanging: tuple[int, ...] = ()
    seats: str = ""  # if given, a folder: each process with GPUs leaves NODE-GPU-PID, see take_seats
    chatty: tuple[int, ...] = ()  # print, warn and log

    def check(self, sampler, steps):
        pass

    def dataset(self):
        labels = np.repeat(np.arange(self.labels), self.each)
        return Dataset(np.zeros((len(labels), 1, 2, 2), np.uint8), labels)

    def build(self, device):
        return ToyLearner(self, device)


class ToyLearner:
    broken = False  # with the process, for good
    seats: Sequence[Path] = ()

    def __init__(self, task, device):
        self.task = task
        if task.seats:
            self.seats = take_seats(task.seats)
        if task.layers is None:
            self.network = nn.Linear(task.size, 1, bias=False).to(device)
        else:
            self.network = nn.Sequential(*(nn.Linear(task.size, 1, bias=False) for _ in range(task.layers))).to(device)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset, indices, mirrored):
        pass

    def loss(self, batch, rng):
        labels = set(batch["labels"].tolist())
        for seat in self.seats:
            os.utime(seat)  # when this process last computed
        if labels & set(self.task.failing):
            raise ValueError("this client's camera is broken")
        if labels & set(self.task.hungry):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")
        if labels & set(self.task.greedy):
            take(self.task.greed)
        if labels & set(self.task.deadly):
            print("the camera is on fire", file=sys.stderr, flush=True)
            os._exit(1)
        if labels & set(self.task.crashing):
            ctypes.string_at(0)
        if labels & set(self.task.chatty):
            print("a line of a client's", labels)
            warnings.warn("a warning of a client's", stacklevel=1)
            logging.getLogger("camera").error("an error that a client logs")
        if labels & set(self.task.hanging):
            time.sleep(1000)
        if labels & set(self.task.slow) and (not self.task.gate or os.path.exists(self.task.gate)):
            time.sleep(self.task.pause)
        if labels & set(self.task.crowded) and assigned("CPU") < 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")
        if self.broken or labels & set(self.task.breaking):
            self.broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        target = batch["labels"].float().mean() + 0.1 * torch.randn((), generator=rng)
        loss = sum((weight - target).square().mean() for weight in self.weights())
        if labels & set(self.task.undefined):
            return loss * float("nan")
        return loss * float("inf") if labels & set(self.task.infinite) else loss

    def weights(self):
        yield from self.network.parameters()

    @torch.no_grad()
    def sample(self, n, rng, sampler, steps):
        level = torch.stack([weight.mean() for weight in self.weights()]).mean() * 20
        return (torch.rand((n, 1, 2, 2), generator=rng) * 50 + level).clamp(0, 255).to(torch.uint8)

    def save(self, directory):
        directory.mkdir()
        torch.save(self.network.state_dict(), directory / "network.pt")


@dataclass(frozen=True)
class ToyAdapters(Toy):
    """The same with adapters on two frozen layers."""

    name: ClassVar[str] = "toy-adapters"
    ranks: tuple[int, ...] = (2,)
    scale: float = 0.5

    @property
    def offers(self):
        return frozenset({"adapters", "float32 base"} | ({"equal ranks"} if len(self.ranks) == 1 else set()))

    def build(self, device, trains=lambda name: True):
        return ToyAdaptersLearner(self, device, trains)


class ToyAdaptersLearner(ToyLearner):
    def __init__(self, task, device, trains):
        self.task = task
        rank = max(task.ranks)
        self.network = nn.ModuleDict({"wide": Adapted(6, 4, rank), "square": Adapted(5, 5, rank)}).to(device)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(".lora_" in name and trains(name))
        self.flat = FlatParameters(self.network)
        self.adapters = adapters(self.network, self.flat.layout, task.scale, task.ranks)

    def weights(self):
        for layer in self.network.values():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield layer.base_layer.weight + self.task.scale * b @ a

    def set_base(self, change):
        self.adapters.change_base(self.network, change)


class Adapted(nn.Module):
    """A linear layer with an adapter, its parts named as peft names them."""

    def __init__(self, columns, rows, rank):
        super().__init__()
        self.base_layer = nn.Linear(columns, rows, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, rows, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)


@dataclass(frozen=True)
class Linear:
    """Fits x w to t: the mean over examples of Σ |x w − t|, whose gradient is constant while no sign changes.

    squared: Σ (x w − t)² / 2 instead.
    """

    name: ClassVar[str] = "linear"
    x: tuple[tuple[float, ...], ...] = ((1, 0), (0, 2))  # [examples, inputs]
    t: tuple[tuple[float, ...], ...] = ((4, 6), (8, 12))  # [examples, outputs]
    w: tuple[tuple[float, ...], ...] = ((2, 4), (3, 5))  # [inputs, outputs], in the beginning
    squared: bool = False

    def check(self, sampler, steps):
        pass

    def dataset(self):
        return Dataset(np.arange(4 * len(self.x), dtype=np.uint8).reshape(-1, 1, 2, 2), np.arange(len(self.x)))

    def build(self, device):
        return LinearLearner(self, device)


class LinearLearner:
    def __init__(self, task, device):
        self.task = task
        self.network = nn.ParameterDict({"w": nn.Parameter(torch.tensor(task.w, dtype=torch.float32))}).to(device)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset, indices, mirrored):
        pass

    def loss(self, batch, rng):
        x, t = (torch.tensor(table, dtype=torch.float32)[batch["index"]] for table in (self.task.x, self.task.t))
        error = x @ self.network["w"] - t
        return (error.square() / 2 if self.task.squared else error.abs()).sum(1).mean()

    def save(self, directory):
        directory.mkdir()
        torch.save(self.network.state_dict(), directory / "network.pt")


def assigned(resource):
    """Return how much of a resource the actor that we are in has."""
    import ray

    return ray.get_runtime_context().get_assigned_resources().get(resource, 0)


def take(bytes, piece=50_000_000):
    """Hold that much of the machine's memory for a moment, taken piece by piece."""
    taken = []
    while len(taken) * piece < bytes:
        taken.append(np.ones(piece, np.uint8))
        time.sleep(0.02)


def take_seats(folder):
    """Leave a file for each GPU that Ray says this process may use: in it, when that began. Return the files."""
    import ray

    if not ray.is_initialized():
        return []
    node = ray.get_runtime_context().get_node_id()[:12]
    seats = [Path(folder, f"{node}-{gpu}-{os.getpid()}") for gpu in ray.get_gpu_ids()]
    for seat in seats:
        if not seat.exists():  # else a learner before this one, in the same process
            seat.write_text(str(time.time()))
    return seats
