"""Task `pretrained`: a diffusers pipeline that fedray did not train, to be sampled and scored."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from fedray.errors import UserError, check_name, reason
from fedray.tasks.ddpm.learner import DDPMLearner
from fedray.tasks.images import Images
from fedray.tasks.samplers import SAMPLERS


@dataclass(frozen=True)
class Pretrained(Images):
    """The U-Net of an unconditional pipeline in pixel space (DDPMPipeline, DDIMPipeline …), and a reference dataset."""

    name: ClassVar[str] = "pretrained"

    pipeline: str = ""
    """Folder of the pipeline."""

    def check(self, sampler: str, steps: int) -> None:
        super().check(sampler, steps)
        check_name("sampler", sampler, SAMPLERS)
        trained = load(self.pipeline).scheduler.config.num_train_timesteps
        if not 1 <= steps <= trained:
            raise UserError(f"--sampling-steps {steps}: it must be between 1 and the {trained} steps of training.")

    def build(self, device: torch.device) -> DDPMLearner:
        pipeline = load(self.pipeline)
        return DDPMLearner(copy.deepcopy(pipeline.unet), pipeline.scheduler, None, device)


@cache
def load(folder: str) -> DiffusionPipeline:
    """Load a pipeline. Raises `UserError` if it cannot be loaded, or is not of the kind."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder)
    except Exception as error:  # diffusers has dozens
        raise UserError(f"{folder} is no pipeline that diffusers can load: {reason(error)}.") from None
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel) or hasattr(pipeline, "vqvae"):
        raise UserError(
            f"{folder} is a {type(pipeline).__name__}; only unconditional pipelines in pixel space (those with a "
            f"UNet2DModel, as DDPMPipeline) can be scored."
        )
    if unet.config.num_class_embeds is not None:
        raise UserError(f"{folder} draws given classes; only unconditional pipelines can be scored.")
    size = unet.config.sample_size
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        unet.register_to_config(sample_size=size[0])
    elif not isinstance(size, int):
        raise UserError(f"{folder} draws images of size {size}; only square ones of a fixed size can be scored.")
    if type(pipeline.scheduler).__name__ not in {sampler.scheduler for sampler in SAMPLERS.values()}:
        raise UserError(
            f"{folder} was trained with a {type(pipeline.scheduler).__name__}, which none of the samplers "
            f"({', '.join(SAMPLERS)}) fits."
        )
    return pipeline
