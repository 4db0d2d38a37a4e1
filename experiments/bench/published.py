"""The published shape of shape.py, for fedray and its peers: network, images, a client. Needs NumPy and torch alone."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CLIENTS, IMAGES, COHORT, BATCH, RATE = 1000, 50, 50, 10, 0.1


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


@cache
def generated() -> tuple[np.ndarray, np.ndarray]:
    """Draw ten classes, each a picture with noise: images, uint8 [50,000, 3, 32, 32], and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(CLIENTS * IMAGES) % 10
    pictures = rng.integers(64, 192, (10, 3, 32, 32))
    images = pictures[labels] + rng.integers(-64, 64, (len(labels), 3, 32, 32))
    return images.astype(np.uint8), labels


@cache
def kept() -> nn.Module:
    """Return this process's network."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return cnn()


def loss_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(network(images.float() / 255), labels)


def train(network: nn.Module, shard: np.ndarray) -> list[float]:
    """Train one epoch on a client's images, as one would write it; return the loss of each batch."""
    images, labels = generated()
    optimizer = torch.optim.SGD(network.parameters(), RATE, fused=True)
    losses = []
    for indices in torch.randperm(len(shard)).split(BATCH):
        chosen = shard[indices.numpy()]
        loss = loss_of(network, torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
