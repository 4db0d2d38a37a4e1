"""fedray evaluate: scores of a run's model, of a pipeline, or of a folder of images."""

from collections.abc import Collection
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
from fedray.data.dataset import Dataset
from fedray.data.images import form_of
from fedray.errors import UserError
from fedray.federation.evaluation import (
    Comparison,
    Evaluation,
    Scoring,
    Show,
    check_features,
    evaluate,
    features_of,
    look_for_copies,
    open_reference,
    prompts_of,
    score_images,
)
from fedray.federation.plan import make_plan
from fedray.federation.pool import Pool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import build, model
from fedray.forms import files_named
from fedray.record.run import Run
from fedray.scores import networks
from fedray.scores.nearest import LOOKED_AT
from fedray.seeds import generator
from fedray.tasks import Task
from fedray.tasks.images import Images
from fedray.tasks.pretrained import Pretrained, load

PIPELINE_SAMPLES = 2048  # images that a pipeline is scored on


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
        """Change a configuration as the options say. Raises `UserError` if it does not fit, or names no features."""
        config = super().settings(base)
        # A run's own weights are for its own features.
        if self.features is not None and not networks.network_of(self.features).takes_weights:
            config = replace(config, inception_weights=None)
        given = {name: getattr(self, name) for name in ("features", "inception_weights", "kid_subset_size")}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
        if config.features is None:
            raise UserError(f"{self.target}: say what to measure on, with --features inception, digits or your own.")
        config.check()
        return config

    def reference(self, resolution: int, channels: int) -> dict[str, Any]:
        """Name the images to score against, in the form of those that are scored.

        Raises:
            UserError: they have another size or mode. To resize them moves scores, so it must be asked for.
        """
        if self.dataset_name is None:
            raise UserError(f"{self.target}: say what to score against, with --dataset-name (and --train-data-dir).")
        if self.resolution not in (None, resolution):
            raise UserError(f"--resolution {self.resolution}: {self.target} is {resolution}×{resolution}; give that.")
        if self.dataset_name == "imagefolder" and self.train_data_dir and self.resolution is None:
            form = form_of(Path(self.train_data_dir))
            if form != (resolution, channels):
                raise UserError(
                    f"{self.target} is {resolution}×{resolution} in {channels} channels, and {self.train_data_dir} "
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
    if (options.target / "model_index.json").is_file():
        _evaluate_pipeline(options)
    elif options.target.is_dir() and not (options.target / "config.json").is_file():
        _evaluate_folder(options)
    else:
        _evaluate_run(options, files_named(arguments))


def _evaluate_run(options: Evaluate, allowed: Collection[Path]) -> None:
    """Score a run's model against the run's own data, and look for copies where images were held out."""
    run = Run.open(options.target)
    if options.dataset_name or options.train_data_dir or options.crop or options.resolution:
        raise UserError(
            f"{options.target} is a run, which is scored against its own data; leave out --dataset-name, "
            f"--train-data-dir, --crop and --resolution."
        )
    config = options.settings(run.config_with(allowed))
    n = config.evaluate_samples if options.samples is None else options.samples
    if n < 1:
        raise UserError(f"the run at {options.target} was not evaluated; say how many samples (--samples).")
    plan = make_plan(replace(config, evaluate_samples=n))
    run.check_data(plan.data)
    shared = model_of(options.target, config)
    sampling = replace(Sampling.of(config, n, prompts_of(config, plan.dataset)), seed=options.seed)
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        comparison = _compare(config, plan.dataset, pool, show)
        evaluation = evaluate(pool, shared, sampling, comparison, LOOKED_AT, show)
        if len(plan.unseen):
            share, _, _ = look_for_copies(pool, evaluation.images, plan.trained, plan.unseen, show)
            evaluation.scores["copies"] = share.to_json()
    _print(options, sampling, evaluation)


def _evaluate_pipeline(options: Evaluate) -> None:
    """Score a pipeline that fedray did not train."""
    folder = str(options.target.absolute())
    unet = load(folder).unet.config
    task = Pretrained(pipeline=folder, **options.reference(unet.sample_size, unet.in_channels))
    config = options.settings(_untrained(task))
    dataset = task.dataset()
    check_features(config, dataset)
    pretrained = model({"model": build(config, torch.device("cpu")).flat.vector.detach()})
    sampling = replace(Sampling.of(config, options.samples or PIPELINE_SAMPLES), seed=options.seed)
    with open_pool(config, dataset) as pool, progress(1) as (_, show):
        comparison = _compare(config, dataset, pool, show)
        evaluation = evaluate(pool, pretrained, sampling, comparison, show=show)
    _print(options, sampling, evaluation)


def _evaluate_folder(options: Evaluate) -> None:
    """Score a folder of images, made by any model."""
    resolution, channels = form_of(options.target)
    reference = Images(**options.reference(resolution, channels))
    folder = Images("imagefolder", str(options.target), resolution=resolution, channels=channels)
    config = options.settings(_untrained(reference))
    dataset, scored = reference.dataset(), folder.dataset()
    n = options.samples or len(scored)
    if n > len(scored):
        raise UserError(f"--samples {n}: {options.target} has {len(scored)} images.")
    check_features(config, dataset)
    with open_pool(config, dataset) as pool, progress(1) as (_, show):
        comparison = _compare(config, dataset, pool, show)
    with open_pool(replace(config, task=cast(Task, folder)), scored) as pool, progress(1) as (_, show):
        features = np.concatenate(list(features_of(config.eval_batch_size, len(scored), pool, show)))
    # In an order of its own: some of them, and the groups of intervals, should not be one sub-folder each.
    order = torch.randperm(len(scored), generator=generator(0, "folder"))[:n].numpy()
    evaluation = score_images(scored.images, features[order], comparison, n)
    kind = "grey" if channels == 1 else "RGB"
    title = f"{options.target}: {n} images, {resolution}×{resolution} {kind}, against {len(dataset)}"
    print_scores(title, evaluation)


def _untrained(task: object) -> Config:
    """Make the settings that a pool is opened with where nothing is trained: a task, and a placement to be filled in.

    A pool's workers read their threads, their device and their feature network from a `Config`, and a `Config` says
    how long clients train, which has no meaning here.
    """
    return Config(task=cast(Task, task), clients=1, local_steps=1)


def _compare(config: Config, dataset: Dataset, pool: Pool, show: Show) -> Comparison:
    """Open the dataset and reference that samples are compared with."""
    scoring = Scoring.of(config)
    assert scoring is not None
    return Comparison(dataset, scoring, open_reference(scoring, dataset, pool, show))


def _print(options: Evaluate, sampling: Sampling, evaluation: Evaluation) -> None:
    print_scores(f"{options.target}: {sampling.n} samples, {sampling.sampler}-{sampling.steps}", evaluation)
