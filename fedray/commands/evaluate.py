"""fedray evaluate: scores of a run's model, of a pipeline, or of a folder of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from fedray.commands.sample import Draw
from fedray.config import Config
from fedray.data.images import form_of
from fedray.errors import UserError
from fedray.forms import files_named
from fedray.record.copies import local
from fedray.scores import networks
from fedray.storage import folder, is_url, shown


@dataclass(frozen=True, kw_only=True)
class Evaluate(Draw):
    """Score a run's model, a diffusers pipeline or a folder of images.

    A run is scored against its own data; a pipeline or a folder against --dataset-name and --train-data-dir.
    """

    target: tyro.conf.Positional[Path]
    """Directory of a run, of a pipeline (unconditional, in pixel space), or of images; or its URL."""
    samples: int | None = None
    """How many images to score; by default as many as the run did, of a pipeline 2048, of a folder all."""
    repeats: int = 1
    """Sets of images to draw and score, each from other noise: scores are then their means, ± their spread."""
    features: str | None = None
    """What scores are measured on: inception (inception-768, -192, -64), digits, clip:FOLDER, dinov2:FOLDER, FILE.pt,
    MODULE:FUNCTION or FILE.py:FUNCTION; by default the run's."""
    inception_weights: str | None = None
    """File of Inception's weights (pytorch-fid's); by default torch's hub cache."""
    kid_subset_size: int | None = None
    """Images in each of the 100 subsets that the kernel distance is averaged over; by default the run's, or 1000."""
    dataset_name: str | None = None
    """What to score a pipeline or a folder against: digits, imagefolder, celeba, a .parquet file, a hub name."""
    train_data_dir: str | None = None
    """Folder of those images, or its URL."""
    crop: int | None = None
    """Side of the central square that is kept of each of those images."""
    resolution: int | None = None
    """Resize those images to this, the size of what is scored; without it they must have it already."""

    @property
    def where(self) -> str:
        """The target, for messages."""
        return shown(self.target)

    def settings(self, base: Config) -> Config:
        """Change a configuration as the options say. Raises `UserError` if it does not fit, or names no features."""
        config = super().settings(base)
        # A run's own weights are for its own features.
        if self.features is not None and not networks.network_of(self.features).takes_weights:
            config = replace(config, inception_weights=None)
        given = {name: getattr(self, name) for name in ("features", "inception_weights", "kid_subset_size")}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
        if config.features is None:
            raise UserError(f"{self.where}: say what to measure on, with --features inception, digits or your own.")
        config.check()
        return config

    def reference(self, resolution: int, channels: int) -> dict[str, Any]:
        """Name the images to score against, in the form of those that are scored.

        Raises:
            UserError: they have another size or mode. To resize them moves scores, so it must be asked for.
        """
        if self.dataset_name is None:
            raise UserError(f"{self.where}: say what to score against, with --dataset-name (and --train-data-dir).")
        if self.resolution not in (None, resolution):
            raise UserError(f"--resolution {self.resolution}: {self.where} is {resolution}×{resolution}; give that.")
        if self.dataset_name == "imagefolder" and self.train_data_dir and self.resolution is None:
            form = form_of(folder(self.train_data_dir, "--train-data-dir "))
            if form != (resolution, channels):
                raise UserError(
                    f"{self.where} is {resolution}×{resolution} in {channels} channels, and {self.train_data_dir} "
                    f"{form[0]}×{form[0]} in {form[1]}; to resize (or convert) it, say --resolution {resolution}."
                )
        return {
            "dataset_name": self.dataset_name, "train_data_dir": self.train_data_dir, "crop": self.crop,
            "resolution": resolution, "channels": channels,
        }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Parse and run `fedray evaluate`."""
    options = tyro.cli(Evaluate, args=arguments, prog="fedray evaluate")
    if options.samples is not None and options.samples < 2:
        raise UserError(f"--samples {options.samples}: a score needs at least 2.")
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: it must be above 0.")

    from fedray.commands import scoring  # Ray and torch take seconds to import: mistakes are told before

    target = local(options.target, whole=True)
    if is_url(options.target) and not (target / "config.json").is_file():
        target = folder(str(options.target), "")
    options = replace(options, target=target)
    if (options.target / "model_index.json").is_file():
        scoring.score_pipeline(options)
    elif options.target.is_dir() and not (options.target / "config.json").is_file():
        scoring.score_folder(options)
    else:
        scoring.score_run(options, files_named(arguments))
