"""Tasks: what is learned. A task is a frozen dataclass (the configuration *is* the object) that builds a learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fedray.data.dataset import Dataset
from fedray.lazy import torch
from fedray.vector import FlatParameters
from fedray.vector.adapters import Adapters

# "images": uint8 [b, c, h, w], some of which are "mirrored": bool [b]; "index": int64 [b], in the dataset;
# "labels": int64 [b] and "prompts": list of b texts, where the dataset has them.
Batch = Mapping[str, Any]


class Learner(Protocol):
    """A network on a device. What it trains is `flat`; all else is frozen and the same in every process."""

    flat: FlatParameters

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        """Prepare for losses of these examples (and of their mirror images), for instance encode each of them once."""

    def loss(self, batch: Batch, rng: torch.Generator) -> torch.Tensor:
        """Return the mean loss over the batch, a scalar with a gradient. Every draw comes from `rng` (on the CPU)."""

    def sample(self, n: int, rng: torch.Generator, sampler: str, steps: int) -> torch.Tensor:
        """Sample n images, uint8 [n, channels (1 or 3), height, width], on the CPU.

        The learner of a task that has `prompts(dataset)` takes one more argument, `prompts`: those of the n images;
        that of a task that has `class_labels(n, dataset)`, and gives some, `labels`.
        """

    def save(self, directory: Path) -> None:
        """Write the model as files that diffusers (or the user's own code) loads."""


class Task(Protocol):
    """A model to learn and its data. Picklable: every actor builds its own learner and reads its own data."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def dataset(self) -> Dataset:
        """Load the examples that the clients hold."""

    def build(self, device: torch.device) -> Learner:
        """Build a learner, freshly initialised from torch's global generator (which the caller has seeded)."""

    def check(self, sampler: str, steps: int) -> None:
        """Raise `UserError` if the task cannot be built, or cannot sample so."""


class AdapterLearner(Learner, Protocol):
    """A learner of adapters on a frozen base."""

    adapters: Adapters

    def set_base(self, change: torch.Tensor) -> None:
        """Compute with the base's weights changed by this much: float32, in the form of `adapters.changes`."""


class AdapterTask(Task, Protocol):
    """A task that learns adapters: it `offers` "adapters" to algorithms."""

    offers: frozenset[str]

    def build(self, device: torch.device, trains: Callable[[str], bool] = lambda name: True) -> AdapterLearner:
        """Build a learner that trains the parameters whose names satisfy `trains`."""
