"""Task `pretrained`: a diffusers pipeline that fedray did not train, to be sampled and scored."""

from dataclasses import dataclass
from typing import ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from fedray.choices import UserError, check_name, reason
from fedray.tasks.ddpm import SAMPLERS, DDPMLearner
from fedray.tasks.images import Images


@dataclass(frozen=True)
class Pretrained(Images):
    """The U-Net of an unconditional pipeline in pixel space (DDPMPipeline, DDIMPipeline …), and a reference dataset."""

    name: ClassVar[str] = "pretrained"

    pipeline: str = ""
    """Folder of the pipeline, or its Hugging Face name."""

    def check(self, sampler: str, steps: int) -> None:
        super().check(sampler, steps)
        check_name("sampler", sampler, SAMPLERS)
        trained = self.load().scheduler.config.num_train_timesteps
        if not 1 <= steps <= trained:
            raise UserError(f"--sampling-steps {steps}: it must be between 1 and the {trained} steps of training.")

    def load(self) -> DiffusionPipeline:
        """The pipeline. Raises `UserError` if it cannot be loaded, or is not of the kind."""
        diffusers.utils.logging.disable_progress_bar()
        try:
            pipeline = DiffusionPipeline.from_pretrained(self.pipeline)
        except Exception as error:  # diffusers and the hub have dozens
            raise UserError(f"{self.pipeline} is no pipeline that diffusers can load: {reason(error)}.") from None
        unet = getattr(pipeline, "unet", None)
        if not isinstance(unet, UNet2DModel) or hasattr(pipeline, "vqvae"):
            raise UserError(
                f"{self.pipeline} is a {type(pipeline).__name__}; only unconditional pipelines in pixel space (those "
                f"with a UNet2DModel, as DDPMPipeline) can be scored."
            )
        if type(pipeline.scheduler).__name__ not in {scheduler.__name__ for scheduler in SAMPLERS.values()}:
            raise UserError(
                f"{self.pipeline} was trained with a {type(pipeline.scheduler).__name__}, which none of the samplers "
                f"({', '.join(SAMPLERS)}) fits."
            )
        return pipeline

    def build(self, device: torch.device) -> DDPMLearner:
        pipeline = self.load()
        return DDPMLearner(pipeline.unet, pipeline.scheduler, None, device)
