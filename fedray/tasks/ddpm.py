"""Task `ddpm`: a denoising diffusion model trained from scratch (Ho et al. 2020; Chen 2024, section 2.1)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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

from fedray import data
from fedray.choices import UserError, check_name
from fedray.data import Dataset
from fedray.tasks import Batch
from fedray.vector import FlatParameters

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DATASETS: dict[str, Callable[[], Dataset]] = {"digits": data.digits}


@dataclass(frozen=True)
class DDPM:
    """An unconditional `diffusers.UNet2DModel` that predicts the noise (ε) of a `DDPMScheduler`."""

    name: ClassVar[str] = "ddpm"

    dataset_name: str = "digits"
    """What the clients hold: digits (scikit-learn's 1,797 handwritten digits)."""
    resolution: int = 8
    """Height and width of the images, in pixels."""
    channels: int = 1
    """1 for grey images, 3 for RGB."""
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

    def check(self, sampler: str, steps: int) -> None:
        check_name("dataset", self.dataset_name, DATASETS)
        check_name("sampler", sampler, SAMPLERS)
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

    def dataset(self) -> Dataset:
        check_name("dataset", self.dataset_name, DATASETS)
        dataset = DATASETS[self.dataset_name]()
        form = (self.channels, self.resolution, self.resolution)
        if dataset.images.shape[1:] != form:
            raise UserError(
                f"the images of {self.dataset_name} are {dataset.images.shape[1:]} (channels, height, width), "
                f"but --channels and --resolution say {form}."
            )
        return dataset

    def unet(self) -> UNet2DModel:
        """The network, freshly initialised."""
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
        """The forward process, β from 1e-4 to 0.02 (Chen 2024, section 3.1)."""
        return DDPMScheduler(
            num_train_timesteps=self.ddpm_num_steps,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule=self.ddpm_beta_schedule,
        )

    def build(self, device: torch.device) -> "DDPMLearner":
        return DDPMLearner(self.unet(), self.scheduler(), device)


class DDPMLearner:
    """A U-Net on a device, and the forward process that it learns to invert."""

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, device: torch.device) -> None:
        self.unet = unet.to(device)
        self.scheduler = scheduler
        self.device = device
        self.flat = FlatParameters(self.unet)
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def loss(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """‖ε − ε_θ(√ᾱ_t x_0 + √(1 − ᾱ_t) ε, t)‖², t uniform (Ho et al. 2020, equation 14)."""
        images = batch["images"].to(self.device).float() / 127.5 - 1  # [b, c, h, w] in [−1, 1]
        timesteps = torch.randint(len(self.alphas_cumprod), (len(images),), generator=rng).to(self.device)
        noise = torch.randn(images.shape, generator=rng).to(self.device)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        return F.mse_loss(self.unet(noisy, timesteps).sample, noise)

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
        """A folder for `diffusers.DDPMPipeline.from_pretrained`."""
        DDPMPipeline(self.unet, self.scheduler).save_pretrained(directory)
