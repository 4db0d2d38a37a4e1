"""The common part of feature networks."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedray.errors import UserError, reason
from fedray.scores.metrics import Score
from fedray.scores.reference import Reference

Network = Callable[[Tensor], Tensor]  # uint8 [n, c, h, w] to float32 [n, d] on the CPU


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network by name. Its weights are read when it is loaded, not before."""

    name: str

    runs_code: ClassVar[bool] = False  # of the user's own, which must not run because a run directory names it
    takes_weights: ClassVar[bool] = False  # from --inception-weights
    own: ClassVar[tuple[str, ...]] = ()  # names of scores that it can always give beside the common ones

    def build(self, device: torch.device) -> Callable[[Tensor], Any]:
        """Build the network on a device: uint8 [n, c, h, w] there, to [n, d]. Raises `UserError`."""
        raise NotImplementedError

    def load(self, device: torch.device) -> Network:
        """Build the network; what is returned takes images on the CPU and gives features there.

        Raises:
            UserError: its weights are absent or damaged.
        """
        network = self.build(device)

        @torch.no_grad()
        def features(images: Tensor) -> Tensor:
            made = torch.as_tensor(network(images.to(device)))
            if made.ndim != 2 or len(made) != len(images):
                shape = list(made.shape)
                raise ValueError(f"it made features {shape} of {len(images)} images, not [{len(images)}, d]")
            return made.float().cpu()

        return features

    def check(self, images: np.ndarray) -> None:
        """Raise `UserError` unless the network can be loaded, and can judge these images, uint8 [n, c, h, w]."""
        network = self.load(torch.device("cpu"))
        try:
            network(first(images))
        except Exception as error:  # it may be anybody's
            shape = "×".join(map(str, images.shape[1:]))
            raise UserError(f"--features {self.name} cannot take images of {shape}: {reason(error)}.") from None

    def key(self, images: np.ndarray) -> str:
        """Name the network and its weights: features with the same key can be compared.

        Args:
            images: uint8 [n, c, h, w], of the kind that it is used on.
        """
        return f"{self.name} {hashlib.sha256(self.content(images)).hexdigest()}"

    def content(self, images: np.ndarray) -> bytes:
        """Give what a key is the hash of.

        Of somebody else's network, what it makes of the first two images: its weights may lie anywhere.
        """
        return self.load(torch.device("cpu"))(first(images)).numpy().tobytes()

    @property
    def label(self) -> str:
        """The part in brackets of the names of scores on these features."""
        return Path(self.name.rpartition(":")[2]).stem

    def score_name(self, metric: str) -> str:
        """Name a score so that it says its features: fid, fid[64], fd[digits], kid, kid[digits] …"""
        return f"{metric}[{self.label}]"

    def own_scores(self, features: Tensor, reference: Reference, prompts: Sequence[str]) -> dict[str, Score]:
        """Score features [n, d] of generated images by what this network alone can tell.

        Args:
            prompts: n texts that the images were generated for, or none.
        """
        return {}


def first(images: np.ndarray) -> Tensor:
    """Take the first two images."""
    return torch.from_numpy(images[:2].copy())
