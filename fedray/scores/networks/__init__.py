"""Feature networks: what images are compared by. A network maps uint8 [n, c, h, w] to float32 [n, d].

digits                          the classifier of 8×8 digits that ships with fedray, d = 64
inception, inception-768 …      pytorch-fid's Inception, d = 2048, 768, 192 or 64
clip:FOLDER                     a CLIP model in Hugging Face's form, d = its projection's width
dinov2:FOLDER                   a DINOv2 model in Hugging Face's form, d = its width
FILE.pt                         a TorchScript module
MODULE:FUNCTION, FILE.py:FUNCTION   a Python function
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedray.errors import UserError, check_name
from fedray.forms import CODE, TORCHSCRIPT
from fedray.lazy import torch

if TYPE_CHECKING:
    from fedray.scores.networks.network import FeatureNetwork, Network

INCEPTION = {"inception": 2048, "inception-768": 768, "inception-192": 192, "inception-64": 64}
CLIP, DINOV2 = "clip:", "dinov2:"


def network_of(name: str, weights: str | None = None) -> FeatureNetwork:
    """Choose the feature network of that name. Imports what it needs, and reads no weights.

    Args:
        weights: file of Inception's weights; None takes torch's hub cache.

    Raises:
        UserError: there is none of that name.
    """
    if name == "digits":
        from fedray.scores.networks.digits import Digits

        return Digits(name)
    if name in INCEPTION:
        from fedray.scores.networks.inception import Inception

        return Inception(name, INCEPTION[name], weights)
    if name.startswith(CLIP):
        from fedray.scores.networks.clip import Clip

        return Clip(name, name.removeprefix(CLIP))
    if name.startswith(DINOV2):
        from fedray.scores.networks.dinov2 import DINOv2

        return DINOv2(name, name.removeprefix(DINOV2))
    from fedray.scores.networks.own import Function, TorchScript

    if name.endswith(TORCHSCRIPT):
        return TorchScript(name)
    if ":" not in name:
        check_name("feature network", name, ("digits", *INCEPTION))
    return Function(name)


def load(name: str, weights: str | None, device: torch.device) -> Network:
    """Load the feature network of that name on a device. Raises `UserError` if it cannot be."""
    return network_of(name, weights).load(device)


def check(name: str, weights: str | None, images: np.ndarray) -> None:
    """Raise `UserError` unless the network can be loaded, and can judge images uint8 [n, c, h, w].

    All commands ask here before they train or generate anything.
    """
    network = network_of(name, weights)
    if weights is not None and not network.takes_weights:
        raise UserError(f"--inception-weights is given, but the features are {name} (--features inception).")
    network.check(images)


def key(name: str, weights: str | None, images: np.ndarray) -> str:
    """Name the network and its weights: features of these images with the same key can be compared."""
    return network_of(name, weights).key(images)


def absolute(name: str) -> str:
    """Make the path in a name absolute, if there is one: actors have other working directories."""
    for prefix in (CLIP, DINOV2):
        if name.startswith(prefix):
            folder = Path(name.removeprefix(prefix))
            return f"{prefix}{folder.absolute()}" if folder.is_dir() else name
    file, colon, function = name.partition(":")
    return str(Path(file).absolute()) + colon + function if file.endswith(CODE) else name
