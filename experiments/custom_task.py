"""A network and a dataset of your own, federated without touching fedray.

    python experiments/custom_task.py

Coloured discs and squares, 16×16 RGB, drawn here; a small convolutional network of plain PyTorch that learns
rectified flow (Liu et al. 2022: the velocity from noise to image) in place of diffusion. Each of two clients holds
one shape only (partition by-label), yet the shared model learns both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import fedray
from fedray.commands.terminal import progress


def shapes(n: int) -> fedray.Dataset:
    """n discs and squares of random colour, size and place: uint8 [n, 3, 16, 16], label 0 for a disc."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    radius, x, y = rng.uniform(3, 5, n), rng.uniform(6, 10, n), rng.uniform(6, 10, n)
    dx = np.abs(np.arange(16)[None, None, :] - x[:, None, None])
    dy = np.abs(np.arange(16)[None, :, None] - y[:, None, None])
    distance = np.where(labels[:, None, None] == 0, np.hypot(dx, dy), np.maximum(dx, dy))
    inside = np.clip(radius[:, None, None] - distance, 0, 1)  # [n, 16, 16], with smooth edges
    colour = rng.uniform(100, 255, (n, 3))
    return fedray.Dataset((inside[:, None] * colour[:, :, None, None]).astype(np.uint8), labels)


class Velocity(nn.Module):
    """(x_t [b, 3, 16, 16], t [b]) → dx/dt [b, 3, 16, 16]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(32, width)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=2**i, dilation=2**i))
            for i in range(4)
        )
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * 2 ** torch.arange(16)
        h = self.enter(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


@dataclass(frozen=True)
class Shapes:
    """The task: its fields are its configuration, and are recorded with the run."""

    name: ClassVar[str] = "shapes"
    examples: int = 1000
    width: int = 32

    def check(self, sampler: str, steps: int) -> None:
        if self.width % 8:
            raise fedray.UserError(f"width {self.width} must be a multiple of 8.")

    def dataset(self) -> fedray.Dataset:
        return shapes(self.examples)

    def build(self, device: torch.device) -> "Flow":
        return Flow(Velocity(self.width).to(device), device)


class Flow:
    """The learner: a network on a device, whose trainable parameters `flat` makes views of one vector."""

    def __init__(self, network: Velocity, device: torch.device) -> None:
        self.network, self.device = network, device
        self.flat = fedray.FlatParameters(network)

    def prepare(self, dataset: fedray.Dataset, indices: np.ndarray, mirrored: bool) -> None:
        """Nothing has to be encoded before training."""

    def loss(self, batch: Mapping[str, Any], rng: torch.Generator) -> Tensor:
        image = batch["images"].to(self.device).float() / 127.5 - 1
        noise = torch.randn(image.shape, generator=rng).to(self.device)
        t = torch.rand(len(image), generator=rng).to(self.device)
        x = torch.lerp(noise, image, t[:, None, None, None])
        return F.mse_loss(self.network(x, t), image - noise)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, sampler: str, steps: int) -> Tensor:
        x = torch.randn((n, 3, 16, 16), generator=rng).to(self.device)
        for step in range(steps):  # Euler; `sampler` names diffusers' solvers, of which this has no use
            x = x + self.network(x, torch.full((n,), step / steps)) / steps
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def save(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        torch.save(self.network.state_dict(), directory / "velocity.pt")


def main(out: Path = Path("runs/shapes"), rounds: int = 30, examples: int = 1000, actors: int | None = None) -> None:
    """Train; continues the run in OUT if there is one.

    Args:
        out: directory of the run.
        rounds: communication rounds.
        examples: images in all.
        actors: client actors; 0 trains in this process.
    """
    config = fedray.Config(
        task=Shapes(examples=examples),
        clients=2,
        partition=fedray.ByLabel(),
        rounds=rounds,
        local_epochs=1,
        train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        sampling_steps=50,
        evaluate_samples=64,
        actors=actors,
    )
    with progress(rounds) as (on_row, show):
        run = fedray.run(config, out, resume=(out / "config.json").exists(), on_row=on_row, show=show)
    print(f"loss      {run.rows[-1]['loss']:.4f}\nsamples   {run.directory / 'samples.png'}")


if __name__ == "__main__":
    tyro.cli(main)
