"""The images that a task learns from: settings that tasks have in common."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedray.data import sources
from fedray.data.buckets import Size
from fedray.data.dataset import Dataset
from fedray.data.images import Form
from fedray.errors import UserError, check_name
from fedray.storage import folder, is_url

DATASETS = ("digits", "imagefolder", "celeba")


@dataclass(frozen=True)
class Images:
    """A source of images, and the form that they are brought into. By itself it learns nothing: it is only scored."""

    name: ClassVar[str] = "images"

    dataset_name: str = "digits"
    """digits (scikit-learn's), imagefolder or celeba (in --train-data-dir), a .parquet file, or a Hugging Face name."""
    train_data_dir: str | None = None
    """Folder of the images, or its URL, as s3://BUCKET/FOLDER: any tree of them (imagefolder), or what CelebA was
    unpacked into (celeba)."""
    crop: int | None = None
    """Side of the central square that is kept of each image, in pixels; None keeps the largest."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, instead of stopping."""
    resolution: int = 8
    """Height and width that images are resized to, in pixels."""
    channels: int = 1
    """1 for grey images, 3 for RGB."""
    label_pattern: str | None = None
    """Regular expression that finds an image's label in its file name, by its first group, as obj(\\d+)__ (of
    imagefolder)."""
    max_train_samples: int | None = None
    """Take so many examples at random (the same for every seed), for a quick try; None takes all."""
    dataset_config_name: str | None = None
    """Configuration of a Hugging Face dataset that has several."""
    image_column: str | None = None
    """Column of a Hugging Face dataset or .parquet file that has the images; by default the first that does."""

    def __post_init__(self) -> None:
        # Actors and resumed runs have other working directories.
        if self.train_data_dir is not None and not is_url(self.train_data_dir):
            object.__setattr__(self, "train_data_dir", str(Path(self.train_data_dir).absolute()))
        if self.dataset_name not in DATASETS and Path(self.dataset_name).exists():
            object.__setattr__(self, "dataset_name", str(Path(self.dataset_name).absolute()))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of several aspect ratios that images are brought to, besides to squares."""
        return ()

    def check(self, sampler: str, steps: int) -> None:
        """Raise `UserError` for what is wrong without looking at the images."""
        name, directory = self.dataset_name, self.train_data_dir
        if name in ("imagefolder", "celeba") and directory is None:
            raise UserError(f"--dataset-name {name} needs --train-data-dir, the folder of the images.")
        if name not in ("imagefolder", "celeba") and directory is not None:
            raise UserError(
                f"--train-data-dir is given with --dataset-name {name}; say --dataset-name imagefolder or celeba "
                f"(or --preset faces)."
            )
        # A name that is nearly one of ours is a slip, not one of the hub's.
        if name not in DATASETS and "/" not in name and difflib.get_close_matches(name, DATASETS, 1, 0.75):
            check_name("dataset", name, DATASETS)
        for name in ("dataset_config_name", "image_column"):
            if getattr(self, name) is not None and (self.dataset_name in DATASETS):
                raise UserError(
                    f"--{name.replace('_', '-')} is for Hugging Face datasets; --dataset-name {self.dataset_name} is "
                    f"none."
                )
        if self.label_pattern is not None and self.dataset_name != "imagefolder":
            raise UserError(f"--label-pattern is for folders of images; --dataset-name {self.dataset_name} is none.")
        for name in ("crop", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be above 0.")
        if self.resolution <= 0:
            raise UserError(f"--resolution {self.resolution}: it must be above 0.")
        if self.channels not in (1, 3):
            raise UserError(f"--channels {self.channels}: it must be 1 (grey) or 3 (RGB).")

    def dataset(self) -> Dataset:
        form = Form(self.resolution, self.channels, self.crop, self.sizes)
        if self.dataset_name == "digits":
            dataset = sources.digits(self.max_train_samples)
            if dataset.images.shape[1:] != (self.channels, self.resolution, self.resolution):
                raise UserError(
                    f"the digits are 8×8 and grey, not {self.resolution}×{self.resolution} in {self.channels} channels "
                    f"(--resolution, --channels)."
                )
            return dataset
        if self.train_data_dir is None:
            return sources.hugging_face(
                self.dataset_name, form, self.skip_unreadable, self.max_train_samples,
                self.dataset_config_name, self.image_column,
            )  # fmt: skip
        images = folder(self.train_data_dir, "--train-data-dir ")
        given = images, form, self.skip_unreadable, self.max_train_samples
        if self.dataset_name == "celeba":
            return sources.celeba(*given)
        return sources.image_folder(*given, self.label_pattern)
