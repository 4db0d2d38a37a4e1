"""Task `lora`: adapters on a frozen Stable Diffusion (Hu et al. 2021, arXiv:2106.09685; Chen 2024, section 2.3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import tyro

from fedray.data.buckets import Size, sizes_in
from fedray.data.captions import captions_of
from fedray.data.dataset import Dataset
from fedray.data.images import Form
from fedray.data.sources import image_folder
from fedray.errors import UserError, check_name
from fedray.lazy import torch
from fedray.storage import folder
from fedray.tasks.images import Images
from fedray.tasks.lora.pipelines import (
    DTYPES,
    base_sha256,
    check_targets,
    pipeline_folder,
    resolution_factor,
    scheduler_config,
)
from fedray.tasks.samplers import SAMPLERS

if TYPE_CHECKING:
    from fedray.tasks.lora.learner import LoRALearner

PREDICTION_TYPES = ("epsilon", "v_prediction")
PIPELINE = Path(__file__).parents[1] / "digits_pipeline"  # a small one that ships with fedray (`fedray.tasks.embedded`)


@dataclass(frozen=True)
class LoRA(Images):
    """Low-rank adapters B A on the attention of a Stable Diffusion 1.x or 2.x U-Net: h = W x + (α / r) B A x."""

    name: ClassVar[str] = "lora"

    pretrained_model_name_or_path: str = ""
    """Folder of a Stable Diffusion 1.x or 2.x pipeline, its URL, as s3://BUCKET/FOLDER, or its Hugging Face name."""
    revision: str | None = None
    """Branch, tag or commit of the pipeline on the hub; by default its newest."""
    variant: str | None = None
    """Which of the pipeline's weight files to take, where it has several, as fp16."""
    dataset_name: str = "imagefolder"
    """imagefolder (in --train-data-dir), a .parquet file, or a Hugging Face name."""
    resolution: int = 512
    """Height and width that images are cropped and resized to, and of what is drawn, in pixels."""
    aspect_ratio_buckets: str | None = None
    """Sizes that images are cropped and resized to for training, each to the nearest, HEIGHT,WIDTH;HEIGHT,WIDTH … as
    512,512;384,640; by default squares of the resolution."""
    channels: Annotated[int, tyro.conf.Suppress] = 3
    base_dtype: str = "float32"
    """In what the frozen base is held and computed: float32, bfloat16 or float16. Adapters are float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, instead of keeping them: less memory, more time."""
    rank: int | tuple[int, ...] = 8
    """r, the rank of the adapters; or several, which clients have in turn by their numbers (4 8 16: client 0 has 4,
    client 3 again)."""
    lora_alpha: float | None = None
    """α: adapters count α / r times, r the largest; by default it is that r."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, in training."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the U-Net's layers that get an adapter."""
    caption_column: str = "text"
    """Column of metadata.jsonl or .csv (or of the dataset) that has the captions."""
    instance_prompt: str | None = None
    """One caption for all images, in place of captions from files."""
    proportion_empty_prompts: float = 0.0
    """Share of training examples whose caption is left out, which keeps guidance working (0.1 is usual)."""
    noise_offset: float = 0.0
    """Scale of noise that is the same for a whole channel (0.1 helps with dark and light images)."""
    prediction_type: str | None = None
    """What the U-Net learns to predict: epsilon (the noise) or v_prediction (the velocity); by default what the
    pipeline's scheduler says."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss with this γ (5 is usual); None weighs all steps alike."""
    class_data_dir: str | None = None
    """Folder of images of the class, for prior preservation (DreamBooth); every client has them."""
    class_prompt: str | None = None
    """Their caption."""
    prior_loss_weight: float = 1.0
    """Weight of their loss."""
    validation_prompt: tuple[str, ...] = ()
    """Prompts that samples are drawn for; by default the captions of the data."""
    guidance_scale: float = 7.5
    """Classifier-free guidance when sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, tuple) and len(set(self.rank)) == 1:
            object.__setattr__(self, "rank", self.rank[0])
        for name in ("pretrained_model_name_or_path", "class_data_dir"):
            value = getattr(self, name)
            if value and Path(value).exists():
                object.__setattr__(self, name, str(Path(value).absolute()))

    @property
    def folder(self) -> Path:
        """Where the pipeline is on this machine, fetched if need be. Raises `UserError` if it is not of the kind."""
        return pipeline_folder(self.pretrained_model_name_or_path, self.revision, self.variant)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return () if self.aspect_ratio_buckets is None else sizes_in(self.aspect_ratio_buckets)

    @property
    def scale(self) -> float:
        """α / r."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.largest_rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of clients, in turn by their numbers."""
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    @property
    def largest_rank(self) -> int:
        """The rank of the adapters that are averaged and sampled from."""
        return max(self.ranks)

    def check(self, sampler: str, steps: int) -> None:
        super().check(sampler, steps)
        check_name("sampler", sampler, SAMPLERS)
        check_name("dtype of the base", self.base_dtype, DTYPES)
        if min(self.ranks, default=0) < 1:
            raise UserError(f"--rank {' '.join(map(str, self.ranks))}: it must be at least 1.")
        for name in ("lora_alpha", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0.")
        for name in ("noise_offset", "prior_loss_weight", "guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must not be negative.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout {self.lora_dropout}: it must be at least 0 and below 1.")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise UserError(f"--proportion-empty-prompts {self.proportion_empty_prompts}: it must be from 0 to 1.")
        if (self.class_data_dir is None) != (self.class_prompt is None):
            raise UserError("--class-data-dir and --class-prompt go together: give both, or neither.")
        folder = self.folder
        if self.resolution % resolution_factor(folder):
            raise UserError(
                f"--resolution {self.resolution}: it must be a multiple of {resolution_factor(folder)} for this VAE."
            )
        self._check_sizes(resolution_factor(folder))
        if self.prediction_type is not None:
            check_name("prediction type", self.prediction_type, PREDICTION_TYPES)
        scheduler = scheduler_config(folder)
        kind = self.prediction_type or scheduler.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise UserError(f"{folder} predicts {kind}; only {' and '.join(PREDICTION_TYPES)} are known.")
        trained = scheduler["num_train_timesteps"]
        if not 1 <= steps <= trained:
            raise UserError(f"--sampling-steps {steps}: it must be between 1 and the {trained} steps of training.")
        check_targets(folder, self.target_modules)

    def _check_sizes(self, factor: int) -> None:
        """Raise `UserError` for sizes that cannot be, or do not go with other settings."""
        if self.aspect_ratio_buckets is None:
            return
        flag = f"--aspect-ratio-buckets {self.aspect_ratio_buckets}"
        try:
            sizes = self.sizes
        except ValueError as error:
            raise UserError(f"{flag}: {error}.") from None
        for size in sizes:
            if any(side % factor for side in size):
                raise UserError(f"{flag}: sides must be multiples of {factor} for this VAE and U-Net.")
        if self.crop is not None:
            raise UserError(f"{flag}: --crop keeps a square of each image; leave one of them out.")

    def dataset(self) -> Dataset:
        """Load the images, with a column "caption"."""
        dataset = super().dataset()
        source = self.dataset_name
        if self.train_data_dir is not None:
            source = str(folder(self.train_data_dir, "--train-data-dir "))
        captions = captions_of(dataset, source, self.caption_column, self.instance_prompt)
        return dataset.with_column("caption", np.array(captions, dtype=object))

    def class_images(self) -> Dataset | None:
        """Load the images for prior preservation; None where there are none."""
        if self.class_data_dir is None:
            return None
        form = Form(self.resolution, 3, self.crop)
        images = folder(self.class_data_dir, "--class-data-dir ")
        return image_folder(images, form, self.skip_unreadable, flag="--class-data-dir ")

    def fingerprint(self, dataset: Dataset) -> dict[str, str]:
        """Hash what a resumed run must find again beside its images: captions, class images, and the base's weights."""
        captions = "\n".join(dataset.columns["caption"]).encode()
        extra = self.class_images()
        found = {"captions_sha256": hashlib.sha256(captions).hexdigest()}
        found |= {"class_images_sha256": extra.sha256} if extra is not None else {}
        if self.sizes:
            if dataset.buckets is None:
                raise UserError("--aspect-ratio-buckets: these images were not decoded from files, and have one size.")
            found["buckets_sha256"] = dataset.buckets.sha256
        return found | {"base_sha256": base_sha256(self.folder, self.variant)}

    def prompts(self, dataset: Dataset) -> tuple[str, ...]:
        """Return the prompts of samples: the validation prompts, else the captions, each once."""
        return self.validation_prompt or tuple(dict.fromkeys(dataset.columns["caption"]))

    @property
    def offers(self) -> frozenset[str]:
        """Properties that algorithms may require."""
        found = {"adapters", "labels"} | ({"float32 base"} if self.base_dtype == "float32" else set())
        return frozenset(found | ({"equal ranks"} if len(self.ranks) == 1 else set()))

    def build(self, device: torch.device, trains: Callable[[str], bool] = lambda name: True) -> LoRALearner:
        from fedray.tasks.lora.learner import LoRALearner

        return LoRALearner(self, device, trains)
