"""A task whose images can only be memorised."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.vector import FlatParameters


@dataclass(frozen=True)
class Memory:
    """A small denoiser of images that are noise: nothing can be learned of them but the images themselves."""

    name: ClassVar[str] = "memory"
    count: int = 64

    def check(self, sampler, steps):
        pass

    def dataset(self):
        rng = np.random.default_rng(0)
        return Dataset(rng.integers(0, 2, (self.count, 1, 4, 4)).astype(np.uint8) * 255)

    def build(self, device):
        return Denoiser()


class Denoiser:
    def __init__(self):
        self.network = nn.Sequential(nn.Linear(17, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 16))
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset, indices, mirrored):
        pass

    def loss(self, batch, rng):
        x = batch["images"].flatten(1).float() / 127.5 - 1
        t, noise = torch.rand(len(x), 1, generator=rng), torch.randn(x.shape, generator=rng)
        noisy = (1 - t).sqrt() * x + t.sqrt() * noise
        return (self.network(torch.cat([noisy, t], 1)) - noise).square().mean()

    def sample(self, n, rng, sampler, steps):
        raise NotImplementedError

    def save(self, directory):
        directory.mkdir()


def memory_config(**changes):
    """Two clients of 32 images each, for two rounds, in this process."""
    settings = dict(
        task=Memory(), clients=2, rounds=2, local_steps=6, train_batch_size=8, learning_rate=0.05, optimizer="sgd",
        max_grad_norm=None, evaluate_samples=0, actors=0,
    )  # fmt: skip
    return Config(**(settings | changes))
