"""The network of the task `ddpm`, its loss and its samples."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from fedray.data.dataset import Dataset
from fedray.tasks import Batch
from fedray.tasks.graphs import Graphed
from fedray.tasks.samplers import make_sampler, sample_pixels
from fedray.vector import FlatParameters


class DDPMLearner:
    """A U-Net on a device, and the forward process that it learns to invert."""

    def __init__(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, snr_gamma: float | None, device: torch.device
    ) -> None:
        self.unet = unet.to(device)
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        self.device = device
        self.flat = FlatParameters(self.unet)
        self.network = Graphed(self.unet)
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)

    @property
    def classes(self) -> int:
        """How many classes the network is conditioned on; 0 where it is unconditional."""
        return self.unet.config.num_class_embeds or 0

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return ‖target − f_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖², t uniform (Ho et al. 2020, equation 14).

        The target is ε, v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022), or x_0, then weighted by the
        signal-to-noise ratio as diffusers does; with γ, by min(SNR, γ) relative to x_0 (Hang et al. 2023). A
        class-conditional network is given the batch's labels too.
        """
        images = sent(batch["images"], self.device).float() / 127.5 - 1  # [b, c, h, w] in [−1, 1]
        timesteps = sent(torch.randint(len(self.alphas_cumprod), (len(images),), generator=rng), self.device)
        noise = sent(torch.randn(images.shape, generator=rng), self.device)
        given = [sent(batch["labels"], self.device)] if self.classes else []
        predicted = self.network(self.scheduler.add_noise(images, noise, timesteps), timesteps, *given).float()
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(images, noise, timesteps)
        else:
            target = noise if kind == "epsilon" else images
        return weighted_loss(predicted, target, self.alphas_cumprod[timesteps], kind, self.snr_gamma)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, sampler: str, steps: int, labels: Sequence[int] = ()) -> Tensor:
        """Sample n images, uint8 [n, c, h, w]: image i of class `labels[i]`, by default of all classes in turn."""
        given = {}
        if self.classes:
            wanted = labels or [index % self.classes for index in range(n)]
            given = {"class_labels": torch.tensor(wanted, device=self.device)}
        scheduler = make_sampler(sampler, self.scheduler.config)
        size = self.unet.config.sample_size
        noise = torch.randn((n, self.unet.config.in_channels, size, size), generator=rng).to(self.device)
        return sample_pixels(lambda x, t: self.unet(x, t, **given).sample, noise, scheduler, sampler, steps, rng)

    def load(self, directory: Path) -> None:
        """Take over the network that `save` wrote. Raises ValueError where it is another one."""
        found = UNet2DModel.from_pretrained(directory, subfolder="unet")
        if (other := difference(self.unet, found)) is not None:
            raise ValueError(other)
        self.unet.load_state_dict(found.state_dict())  # in place: parameters stay views of the vector

    def save(self, directory: Path) -> None:
        """Write a folder for `diffusers.DDPMPipeline.from_pretrained`."""
        DDPMPipeline(self.unet, self.scheduler).save_pretrained(directory)


def difference(mine: UNet2DModel, theirs: UNet2DModel) -> str | None:
    """Say in which setting another network differs from one, but for the size of its samples; None if in none."""
    one, other = (json.loads(network.to_json_string()) for network in (mine, theirs))
    for name, value in one.items():
        if not name.startswith("_") and name != "sample_size" and other.get(name) != value:
            return f"its U-Net has {name} {other.get(name)}, not {value}"
    return None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU's on a device. On the way to a GPU nobody waits: it is still at the step before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def weighted_loss(predicted: Tensor, target: Tensor, alpha: Tensor, kind: str, snr_gamma: float | None) -> Tensor:
    """Return the mean squared error of predictions [b, …], weighted per example as `DDPMLearner.loss` says.

    Args:
        alpha: ᾱ_t [b].
        kind: epsilon, v_prediction or sample.
    """
    if snr_gamma is None and kind != "sample":
        return F.mse_loss(predicted, target)
    snr = alpha / (1 - alpha)
    weight = snr if snr_gamma is None else snr.clamp(max=snr_gamma)  # of ‖x_0 − prediction of x_0‖²
    weight = weight / {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[kind]
    return (weight * F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))).mean()
