"""What `fedray evaluate` does with a run, a pipeline or a folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from fedray.cluster.pool import open_pool
from fedray.commands.sample import model_of
from fedray.commands.terminal import print_scores, progress
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.data.images import form_of
from fedray.errors import UserError
from fedray.federation.cohort import took_part
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
    score_images,
    scored,
)
from fedray.federation.personal import by_clients
from fedray.federation.plan import make_plan
from fedray.federation.pool import Pool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import build, model
from fedray.record.run import Run
from fedray.scores.nearest import LOOKED_AT
from fedray.seeds import generator
from fedray.tasks import Task
from fedray.tasks.images import Images
from fedray.tasks.pretrained import Pretrained, load

if TYPE_CHECKING:
    from fedray.commands.evaluate import Evaluate

PIPELINE_SAMPLES = 2048  # images that a pipeline is scored on


def score_run(options: Evaluate, allowed: Collection[Path]) -> None:
    """Score a run's model against the run's own data, and look for copies where images were held out."""
    run = Run.open(options.target)
    if options.dataset_name or options.train_data_dir or options.crop or options.resolution:
        raise UserError(
            f"{options.where} is a run, which is scored against its own data; leave out --dataset-name, "
            f"--train-data-dir, --crop and --resolution."
        )
    config = options.settings(run.config_with(allowed))
    n = config.evaluate_samples if options.samples is None else options.samples
    if n < 1:
        raise UserError(f"the run at {options.where} was not evaluated; say how many samples (--samples).")
    plan = make_plan(replace(config, evaluate_samples=n))
    run.check_data(plan.data)
    shared = model_of(run.directory, config)
    sampling = replace(scored(config, n, plan.dataset), seed=options.seed, repeats=options.repeats)
    sampling = by_clients(sampling, config, run, run.complete_rounds)
    with open_pool(config, plan.dataset) as pool, progress(config.rounds) as (_, show):
        comparison = _compare(config, plan.dataset, pool, show)
        evaluation = evaluate(pool, shared, sampling, comparison, LOOKED_AT, show)
        trained, unseen = plan.images_of(took_part(run.rows))
        if len(unseen):
            share, _, _ = look_for_copies(pool, evaluation.images, trained, unseen, show)
            evaluation.scores["copies"] = share
    _print(options, sampling, evaluation)


def score_pipeline(options: Evaluate) -> None:
    """Score a pipeline that fedray did not train."""
    folder = str(options.target.absolute())
    unet = load(folder).unet.config
    task = Pretrained(pipeline=folder, **options.reference(unet.sample_size, unet.in_channels))
    config = options.settings(_untrained(task))
    dataset = task.dataset()
    check_features(config, dataset)
    pretrained = model({"model": build(config, torch.device("cpu")).flat.vector.detach()})
    sampling = replace(
        Sampling.of(config, options.samples or PIPELINE_SAMPLES), seed=options.seed, repeats=options.repeats
    )
    with open_pool(config, dataset) as pool, progress(1) as (_, show):
        comparison = _compare(config, dataset, pool, show)
        evaluation = evaluate(pool, pretrained, sampling, comparison, show=show)
    _print(options, sampling, evaluation)


def score_folder(options: Evaluate) -> None:
    """Score a folder of images, made by any model."""
    if options.repeats > 1:
        raise UserError(f"--repeats {options.repeats}: {options.where} is a folder of images, and nothing is drawn.")
    resolution, channels = form_of(options.target)
    reference = Images(**options.reference(resolution, channels))
    folder = Images("imagefolder", str(options.target), resolution=resolution, channels=channels)
    config = options.settings(_untrained(reference))
    dataset, scored = reference.dataset(), folder.dataset()
    n = options.samples or len(scored)
    if n > len(scored):
        raise UserError(f"--samples {n}: {options.where} has {len(scored)} images.")
    check_features(config, dataset)
    with open_pool(config, dataset) as pool, progress(1) as (_, show):
        comparison = _compare(config, dataset, pool, show)
    with open_pool(replace(config, task=cast(Task, folder)), scored) as pool, progress(1) as (_, show):
        features = np.concatenate(list(features_of(config.eval_batch_size, len(scored), pool, show)))
    # In an order of its own: some of them, and the groups of intervals, should not be one sub-folder each.
    order = torch.randperm(len(scored), generator=generator(0, "folder"))[:n].numpy()
    evaluation = score_images(scored.images, features[order], comparison, n)
    kind = "grey" if channels == 1 else "RGB"
    title = f"{options.where}: {n} images, {resolution}×{resolution} {kind}, against {len(dataset)}"
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
    sets = f"{sampling.repeats} × " if sampling.repeats > 1 else ""
    print_scores(f"{options.where}: {sets}{sampling.n} samples, {sampling.sampler}-{sampling.steps}", evaluation)
