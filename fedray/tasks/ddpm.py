"""Task `ddpm`: a denoising diffusion model trained from scratch (Ho et al. 2020; Chen 2024, section 2.1)."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from fedray.data.dataset import Dataset
from fedray.errors import UserError, check_name
from fedray.tasks import Batch
from fedray.tasks.images import Images
from fedray.vector import FlatParameters

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class DDPM(Images):
    """An unconditional `diffusers.UNet2DModel` that learns to invert a `DDPMScheduler`."""

    name: ClassVar[str] = "ddpm"

    block_out_channels: tuple[int, ...] = (16, 32)
    """Channels of the U-Net's blocks, from the finest resolution to the coarsest."""
    attention: tuple[bool, ...] = (False, False)
    """Which of those blocks have self-attention."""
    mid_block_attention: bool = False
    """Self-attention in the U-Net's middle block."""
    layers_per_block: int = 1
    """Residual layers in a block."""
    norm_num_groups: int = 8
    """Groups of the group normalisation."""
    ddpm_num_steps: int = 1000
    """T, the diffusion steps in training."""
    ddpm_beta_schedule: str = "linear"
    """How β rises from 1e-4 to 0.02: linear, scaled_linear or squaredcos_cap_v2."""
    prediction_type: str = "epsilon"
    """What the network predicts: epsilon (the noise), v_prediction (the velocity) or sample (the image)."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss with this γ (5 is usual); None weighs as DDPM does."""

    def check(self, sampler: str, steps: int) -> None:
        super().check(sampler, steps)
        check_name("sampler", sampler, SAMPLERS)
        check_name("prediction type", self.prediction_type, PREDICTION_TYPES)
        counts = ("snr_gamma", "ddpm_num_steps", "layers_per_block", "norm_num_groups", "block_out_channels")
        for name in counts:
            value = getattr(self, name)
            if value is not None and np.min(value, initial=1) <= 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0.")
        check_name("beta schedule", self.ddpm_beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if not 1 <= steps <= self.ddpm_num_steps:
            raise UserError(
                f"--sampling-steps {steps}: it must be between 1 and the {self.ddpm_num_steps} steps of training."
            )
        if len(self.attention) != len(self.block_out_channels):
            raise UserError(
                f"--attention has {len(self.attention)} entries for {len(self.block_out_channels)} blocks "
                f"(--block-out-channels); give one for each."
            )
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise UserError(
                f"--block-out-channels {self.block_out_channels} must be multiples of --norm-num-groups "
                f"{self.norm_num_groups}."
            )
        if self.resolution % 2 ** (len(self.block_out_channels) - 1):
            raise UserError(
                f"--resolution {self.resolution} cannot be halved {len(self.block_out_channels) - 1} times, once "
                f"after each block but the last."
            )

    def unet(self) -> UNet2DModel:
        """Build the network, freshly initialised."""
        down = tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in self.attention)
        up = tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(self.attention))
        return UNet2DModel(
            sample_size=self.resolution,
            in_channels=self.channels,
            out_channels=self.channels,
            block_out_channels=self.block_out_channels,
            down_block_types=down,
            up_block_types=up,
            add_attention=self.mid_block_attention,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
        )

    def scheduler(self) -> DDPMScheduler:
        """Make the forward process, β from 1e-4 to 0.02 (Chen 2024, section 3.1)."""
        return DDPMScheduler(
            num_train_timesteps=self.ddpm_num_steps,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule=self.ddpm_beta_schedule,
            prediction_type=self.prediction_type,
        )

    def build(self, device: torch.device) -> "DDPMLearner":
        return DDPMLearner(self.unet(), self.scheduler(), self.snr_gamma, device)


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
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return ‖target − f_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖², t uniform (Ho et al. 2020, equation 14).

        The target is ε, v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022), or x_0, then weighted by the
        signal-to-noise ratio as diffusers does; with γ, by min(SNR, γ) relative to x_0 (Hang et al. 2023).
        """
        images = batch["images"].to(self.device).float() / 127.5 - 1  # [b, c, h, w] in [−1, 1]
        timesteps = torch.randint(len(self.alphas_cumprod), (len(images),), generator=rng).to(self.device)
        noise = torch.randn(images.shape, generator=rng).to(self.device)
        predicted = self.unet(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample.float()
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            target = self.scheduler.get_velocity(images, noise, timesteps)
        else:
            target = noise if kind == "epsilon" else images
        return weighted_loss(predicted, target, self.alphas_cumprod[timesteps], kind, self.snr_gamma)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, sampler: str, steps: int) -> Tensor:
        scheduler = SAMPLERS[sampler].from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        # Some solvers are deterministic and take no generator; drawing on the CPU is diffusers' own practice.
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra: dict[str, Any] = {"generator": rng} if takes_generator else {}
        size = self.unet.config.sample_size
        x = torch.randn((n, self.unet.config.in_channels, size, size), generator=rng).to(self.device)
        for t in scheduler.timesteps:
            x = scheduler.step(self.unet(x, t).sample, t, x, **extra).prev_sample
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def save(self, directory: Path) -> None:
        """Write a folder for `diffusers.DDPMPipeline.from_pretrained`."""
        DDPMPipeline(self.unet, self.scheduler).save_pretrained(directory)


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
