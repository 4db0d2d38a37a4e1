"""Attacks: what malicious clients do, with their data before they train or with their model before they send it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.lazy import torch
from fedray.seeds import generator


class Attack:
    """What malicious clients do. Derive from it, as a frozen dataclass."""

    abstract = False  # not to be named by users

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    def poison(self, dataset: Dataset) -> Dataset:
        """Return the dataset as malicious clients have it: the same images in the same order.

        Raises:
            UserError: there is nothing in it to attack with.
        """
        return dataset

    def change(self, model: torch.Tensor, received: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return the model [d] that a client sends, given the one that it trained and the one that it received."""
        return model


@dataclass(frozen=True)
class SignFlip(Attack):
    """The change in the opposite direction, `scale` times as long: received − scale (trained − received)."""

    scale: float = 1.0

    def change(self, model: torch.Tensor, received: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        return received - self.scale * (model - received)


@dataclass(frozen=True)
class Noise(Attack):
    """Gaussian noise in place of the change, scale · N(0, I) (Blanchard et al. 2017)."""

    scale: float

    def change(self, model: torch.Tensor, received: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        return received + self.scale * torch.randn(received.shape, generator=rng)


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Trains on label L − 1 − l in place of l (Fang et al. 2020); captions likewise, in their order."""

    @property
    def needs(self) -> Mapping[str, str]:
        return {"labels": "flips labels, and this task learns from none: choose signflip or noise:SCALE"}

    def poison(self, dataset: Dataset) -> Dataset:
        columns = dict(dataset.columns)
        if "caption" in columns:
            captions, places = np.unique(columns["caption"].astype(str), return_inverse=True)
            columns["caption"] = captions[::-1][places].astype(object)
            kinds = len(captions)
        else:
            kinds = 0 if dataset.labels is None else len(np.unique(dataset.labels))
        if kinds < 2:
            raise UserError("--malicious labelflip: all examples have the same label, and flipped it is itself.")
        labels = None if dataset.labels is None else dataset.labels.max() - dataset.labels
        return replace(dataset, labels=labels, columns=columns)


@dataclass(frozen=True)
class Malicious:
    """A share of the clients, drawn from the run's seed, and what they do."""

    share: float
    attack: Attack

    def count(self, clients: int) -> int:
        """Return how many of so many clients are malicious."""
        return math.floor(self.share * clients + 0.5)

    def draw(self, seed: int, clients: int) -> frozenset[int]:
        """Return the malicious clients, the same in every round."""
        order = torch.randperm(clients, generator=generator(seed, "malicious"))
        return frozenset(order[: self.count(clients)].tolist())
