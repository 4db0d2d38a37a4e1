"""Task `ddpm`: a denoising diffusion model trained from scratch (Ho et al. 2020; Chen 2024, section 2.1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedray.data.dataset import Dataset
from fedray.data.sources import DIGITS
from fedray.errors import UserError, check_name
from fedray.lazy import torch
from fedray.tasks.images import Images
from fedray.tasks.samplers import SAMPLERS

if TYPE_CHECKING:  # diffusers takes seconds to import: those that build a network do
    from diffusers import DDPMScheduler, UNet2DModel

    from fedray.tasks.ddpm.learner import DDPMLearner

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class DDPM(Images):
    """A `diffusers.UNet2DModel` that learns to invert a `DDPMScheduler`: unconditional, or given an image's label."""

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
    num_class_embeds: int | None = None
    """Classes of a U-Net that learns each image given its label, from 0 on; None makes it unconditional.
    --class-conditional takes as many as the data has."""
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
        counts = ("snr_gamma", "ddpm_num_steps", "layers_per_block", "norm_num_groups", "block_out_channels",
                  "num_class_embeds")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and np.min(value, initial=1) <= 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0.")
        if self.ddpm_num_steps > 10**6:
            raise UserError(f"--ddpm-num-steps {self.ddpm_num_steps}: it must be at most 1,000,000.")
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

    @property
    def offers(self) -> frozenset[str]:
        """Properties that attacks may require."""
        return frozenset() if self.num_class_embeds is None else frozenset({"labels"})

    def fingerprint(self, dataset: Dataset) -> dict[str, str]:
        """Hash what a resumed run must find again beside its images: the labels, where it learns from them.

        Raises:
            UserError: it cannot learn from these.
        """
        if self.num_class_embeds is None:
            return {}
        if (found := count_classes(dataset)) > self.num_class_embeds:
            raise UserError(
                f"--num-class-embeds {self.num_class_embeds}: the images have labels up to {found - 1}; say {found}, "
                f"or --class-conditional."
            )
        assert dataset.labels is not None
        return {"labels_sha256": hashlib.sha256(np.ascontiguousarray(dataset.labels).tobytes()).hexdigest()}

    def class_labels(self, n: int, dataset: Dataset | None = None) -> tuple[int, ...]:
        """Return labels of n samples, none where it is unconditional: in a dataset's proportions; else all in turn."""
        if self.num_class_embeds is None:
            return ()
        return tuple((np.arange(n) % self.num_class_embeds if dataset is None else dataset.labels_like(n)).tolist())

    def class_names(self, dataset: Dataset) -> dict[int, str]:
        """Return what labels are called, where that is known: of digits, and of folders that are the labels."""
        if self.dataset_name == "digits":
            return dict(enumerate(DIGITS))
        if dataset.labels is None or "folder" not in dataset.columns:
            return {}
        pairs = set(zip(dataset.labels.tolist(), map(str, dataset.columns["folder"]), strict=True))
        names = dict(pairs)
        return names if len(pairs) == len(names) == len(set(names.values())) else {}

    def unet(self) -> UNet2DModel:
        """Build the network, freshly initialised."""
        from diffusers import UNet2DModel

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
            num_class_embeds=self.num_class_embeds,
        )

    def scheduler(self) -> DDPMScheduler:
        """Make the forward process, β from 1e-4 to 0.02 (Chen 2024, section 3.1)."""
        from diffusers import DDPMScheduler

        fresh = DDPMScheduler(
            num_train_timesteps=self.ddpm_num_steps,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule=self.ddpm_beta_schedule,
            prediction_type=self.prediction_type,
        )
        # With every setting explicit, as it is loaded from a saved model. Of a fresh scheduler's settings a sampler
        # replaces those left at their defaults by its own (such as the time grid), and would sample other images.
        return DDPMScheduler.from_config({k: v for k, v in fresh.config.items() if k != "_use_default_values"})

    def build(self, device: torch.device) -> DDPMLearner:
        from fedray.tasks.ddpm.learner import DDPMLearner

        return DDPMLearner(self.unet(), self.scheduler(), self.snr_gamma, device)


def count_classes(dataset: Dataset) -> int:
    """Return how many classes a dataset's labels are of, if they are numbered from 0.

    Raises:
        UserError: there are no labels, all are the same, or some are negative.
    """
    if dataset.labels is None or len(np.unique(dataset.labels)) < 2:
        what = "have no labels" if dataset.labels is None else "all have the same label"
        raise UserError(
            f"a class-conditional U-Net learns from labels, and these images {what}: put those of each class into a "
            f"folder, say --label-pattern, or leave --class-conditional (--num-class-embeds) out."
        )
    if dataset.labels.min() < 0:
        raise UserError(f"a class-conditional U-Net knows labels from 0 on, and the data has {dataset.labels.min()}.")
    return int(dataset.labels.max()) + 1
