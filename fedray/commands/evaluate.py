"""fedray evaluate: scores of a run's model, of a pipeline, or of a folder of images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import tyro

from fedray.cluster.pool import open_pool
from fedray.commands.sample import Draw, model_of
from fedray.commands.terminal import print_scores, progress
from fedray.config import Config
from fedray.data.images import form_of
from fedray.errors import UserError
from fedray.federation.evaluation import evaluate, features_of, judge, look_for_copies, open_reference
from fedray.federation.plan import Plan, make_plan
from fedray.federation.worker import Shared
from fedray.record.run import Run
from fedray.scores import networks
from fedray.scores.nearest import LOOKED_AT
from fedray.seeds import generator
from fedray.tasks import Task
from fedray.tasks.images import Images
from fedray.tasks.pretrained import Pretrained, load


@dataclass(frozen=True, kw_only=True)
class Evaluate(Draw):
    """Score a run's model, a diffusers pipeline or a folder of images.

    A run is scored against its own data; a pipeline or a folder against --dataset-name and --train-data-dir.
    """

    target: tyro.conf.Positional[Path]
    """Directory of a run, of a pipeline (unconditional, in pixel space), or of images."""
    samples: int | None = None
    """How many images to score; by default as many as the run did, of a pipeline 2048, of a folder all."""
    features: str | None = None
    """What scores are measured on: inception (inception-768, -192, -64), digits, FILE.pt, MODULE:FUNCTION or
    FILE.py:FUNCTION; by default the run's."""
    inception_weights: str | None = None
    """File of Inception's weights (pytorch-fid's); by default torch's hub cache."""
    kid_subset_size: int | None = None
    """Images in each of the 100 subsets that the kernel distance is averaged over; by default the run's, or 1000."""
    dataset_name: str | None = None
    """What to score a pipeline or a folder against: digits, imagefolder, celeba, a .parquet file, a hub name."""
    train_data_dir: str | None = None
    """Folder of those images."""
    crop: int | None = None
    """Side of the central square that is kept of each of those images."""
    resolution: int | None = None
    """Resize those images to this, the size of what is scored; without it they must have it already."""

    def settings(self, base: Config) -> Config:
        config = super().settings(base)
        # A run's own weights are for its own features.
        if self.features is not None and self.features not in networks.INCEPTION and self.inception_weights is None:
            config = replace(config, inception_weights=None)
        given = {name: getattr(self, name) for name in ("features", "inception_weights", "kid_subset_size")}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
        if config.features is None:
            raise UserError(f"{self.target}: say what to measure on, with --features inception, digits or your own.")
        config.check()
        return config

    def against(self, resolution: int, channels: int) -> dict[str, Any]:
        """The images to score against, in the form of those that are scored.

        Raises:
            UserError: they have another size or mode. To resize them moves scores, so it must be asked for.
        """
        if self.dataset_name is None:
            raise UserError(f"{self.target}: say what to score against, with --dataset-name (and --train-data-dir).")
        if self.resolution not in (None, resolution):
            raise UserError(f"--resolution {self.resolution}: {self.target} is {resolution}×{resolution}; give that.")
        if self.dataset_name == "imagefolder" and self.train_data_dir and self.resolution is None:
            found = form_of(Path(self.train_data_dir))
            if found != (resolution, channels):
                raise UserError(
                    f"{self.target} is {resolution}×{resolution} in {channels} channels, and {self.train_data_dir} "
                    f"{found[0]}×{found[0]} in {found[1]}; to resize (or convert) it, say --resolution {resolution}."
                )
        form = {"resolution": resolution, "channels": channels}
        return {
            "dataset_name": self.dataset_name, "train_data_dir": self.train_data_dir, "crop": self.crop
        } | form  # fmt: skip


def main(arguments: list[str]) -> None:
    """Parse and run `fedray evaluate`."""
    asked = tyro.cli(Evaluate, args=arguments, prog="fedray evaluate")
    if asked.samples is not None and asked.samples < 2:
        raise UserError(f"--samples {asked.samples}: a score needs at least 2.")
    if (asked.target / "model_index.json").is_file():
        _evaluate_pipeline(asked)
    elif asked.target.is_dir() and not (asked.target / "config.json").is_file():
        _evaluate_folder(asked)
    else:
        _evaluate_run(asked)


def _evaluate_run(asked: Evaluate) -> None:
    run = Run.open(asked.target)
    if asked.dataset_name or asked.train_data_dir or asked.crop or asked.resolution:
        raise UserError(
            f"{asked.target} is a run, which is scored against its own data; leave out --dataset-name, "
            f"--train-data-dir, --crop and --resolution."
        )
    config = asked.settings(run.config)
    n = config.evaluate_samples if asked.samples is None else asked.samples
    if n < 1:
        raise UserError(f"the run at {asked.target} was not evaluated; say how many samples (--samples).")
    plan = make_plan(replace(config, evaluate_samples=n))
    run.check_data(plan.data)
    _evaluate_model(asked, config, plan, model_of(asked.target, config), n)


def _evaluate_pipeline(asked: Evaluate) -> None:
    unet = load(str(asked.target.absolute())).unet.config
    reference = asked.against(unet.sample_size, unet.in_channels)
    task = Pretrained(pipeline=str(asked.target.absolute()), **reference)
    n = asked.samples or 2048
    config = asked.settings(Config(task=task, clients=1, local_steps=1, evaluate_samples=n))
    plan = make_plan(config)
    _evaluate_model(asked, config, plan, Shared({"model": plan.initial.numpy()}), n)


def _evaluate_model(asked: Evaluate, config: Config, plan: Plan, model: Shared, n: int) -> None:
    """Draw, score, and look for copies where the run held images out."""
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        against = open_reference(config, plan.dataset, pool, show)
        found = evaluate(pool, model, n, config, plan.dataset, against, {}, LOOKED_AT, asked.seed, show=show)
        if len(plan.unseen):
            share, _, _ = look_for_copies(pool, found.images, plan.trained, plan.unseen, show)
            found.scores["copies"] = share.to_json()
    print_scores(f"{asked.target}: {n} samples, {config.sampler}-{config.sampling_steps}", found)


def _evaluate_folder(asked: Evaluate) -> None:
    resolution, channels = form_of(asked.target)
    real = Images(**asked.against(resolution, channels))
    folder = Images("imagefolder", str(asked.target), resolution=resolution, channels=channels)
    config = asked.settings(Config(task=cast(Task, real), local_steps=1))
    assert config.features is not None
    dataset, drawn = real.dataset(), folder.dataset()
    n = asked.samples or len(drawn)
    if n > len(drawn):
        raise UserError(f"--samples {n}: {asked.target} has {len(drawn)} images.")
    networks.check(config.features, config.inception_weights, drawn.images)
    with open_pool(config, dataset) as pool, progress(1) as (_, show):
        against = open_reference(config, dataset, pool, show)
    with open_pool(replace(config, task=cast(Task, folder)), drawn) as pool, progress(1) as (_, show):
        features = np.concatenate(list(features_of(config, len(drawn), pool, show)))
    # In an order of its own: some of them, and the groups of intervals, should not be one sub-folder each.
    order = torch.randperm(len(drawn), generator=generator(0, "folder"))[:n].numpy()
    found = judge(features[order], drawn.images, n, config, dataset, against, {})
    kind = "grey" if channels == 1 else "RGB"
    print_scores(f"{asked.target}: {n} images, {resolution}×{resolution} {kind}, against {len(dataset)}", found)
