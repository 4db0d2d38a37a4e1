"""Evaluation: samples of a model, their scores, and whether they copy. All of its work is jobs of the pool."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError, UserError
from fedray.federation.pool import Pool, in_order
from fedray.federation.sampling import FeatureJob, NearestJob, SampleJob, dataset_features, nearest_images, sample_batch
from fedray.federation.worker import Shared, Work, threads
from fedray.scores import networks
from fedray.scores.nearest import EXPECTED, LOOKED_AT, copies
from fedray.scores.reference import Reference, reference
from fedray.scores.scoring import Score, score

GRID = 64  # images that are kept of every evaluation, for its picture

Show = Callable[[str, float, float], None]  # phase, how much of it is done, of how much
Metric = Callable[[np.ndarray, np.ndarray], float]  # a user's own: of samples and the dataset's images, uint8


def silent(phase: str, done: float, total: float) -> None:
    """Show nothing."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out. `about` says how it was measured: count, sampler, features, reference, and what was refused."""

    images: np.ndarray  # uint8 [at least min(n, 64), c, h, w]
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def open_reference(config: Config, dataset: Dataset, pool: Pool, show: Show = silent) -> Reference:
    """The statistics that scores are taken against, worked out by the pool unless this node has them already.

    The key holds all that the bits of features depend on, but for the kind of CPU.

    Raises:
        UserError: there are too few images, or their features are not finite.
        RunError: features could not be made.
    """
    assert config.features is not None
    n = len(dataset)
    key = {
        "images": dataset.sha256,
        "features": networks.key(config.features, config.inception_weights, dataset.images),
        "batch": config.eval_batch_size,
        "threads": config.threads,
        "gpu": bool(config.gpus_per_actor),
    }
    try:
        return reference(f"reference features ({config.features})", n, key, partial(features_of, config, n, pool, show))
    except ValueError as error:
        raise UserError(f"the {n} images of this dataset cannot be scored against: {error}.") from None


def features_of(config: Config, n: int, pool: Pool, show: Show = silent) -> Iterator[np.ndarray]:
    """Features of the n images that the pool's workers have as their dataset, in batches."""
    size = config.eval_batch_size
    jobs = [FeatureJob(start, min(start + size, n)) for start in range(0, n, size)]
    return _results(pool, dataset_features, Shared({}), jobs, "features", show)


def sample(
    pool: Pool,
    model: Shared,
    n: int,
    config: Config,
    seed: int,
    show: Show = silent,
    keep: int | None = None,
    prompts: tuple[str, ...] = (),
) -> tuple[np.ndarray | None, np.ndarray]:
    """Features [n, d] (None without a feature network) and the first `keep` of n images, uint8 [keep, c, h, w].

    The same whatever the pool: image i is drawn in batch i // B, for prompt i modulo their number. Raises `RunError`
    if a batch could not be generated.
    """
    keep = n if keep is None else min(keep, n)
    jobs = [
        SampleJob(
            batch=start // config.eval_batch_size,
            size=min(config.eval_batch_size, n - start),
            sampler=config.sampler,
            steps=config.sampling_steps,
            seed=seed,
            features=config.features is not None,
            keep=max(0, keep - start),
            prompts=turns(prompts, start, min(start + config.eval_batch_size, n)),
        )
        for start in range(0, n, config.eval_batch_size)
    ]
    features, images = zip(*_results(pool, sample_batch, model, jobs, "sampling", show), strict=True)
    return np.concatenate(features) if config.features else None, np.concatenate(images)


def evaluate(
    pool: Pool,
    model: Shared,
    n: int,
    config: Config,
    dataset: Dataset,
    against: Reference | None,
    metrics: Mapping[str, Metric],
    keep: int = GRID,
    seed: int | None = None,
    intervals: bool = True,
    show: Show = silent,
) -> Evaluation:
    """Draw n images of a model and score them.

    Args:
        against: what to score against; None for no scores but the user's own `metrics`, which get all images.
        keep: how many images to return.

    Raises:
        RunError: a batch could not be generated, or a metric of the user's failed.
    """
    keep = n if metrics or config.keep_samples else keep
    prompts = prompts_of(config, dataset)
    features, images = sample(pool, model, n, config, config.seed if seed is None else seed, show, keep, prompts)
    found = judge(features, images, n, config, dataset, against, metrics, intervals, show, turns(prompts, 0, n))
    found.about.update(sampler=config.sampler, sampling_steps=config.sampling_steps)
    return found


def turns(prompts: tuple[str, ...], start: int, stop: int) -> tuple[str, ...]:
    """What images `start` to `stop` are drawn for: the prompts in turn."""
    return tuple(prompts[index % len(prompts)] for index in range(start, stop)) if prompts else ()


def prompts_of(config: Config, dataset: Dataset) -> tuple[str, ...]:
    """What a run's samples are drawn for; nothing, where its task knows no prompts."""
    return getattr(config.task, "prompts", lambda dataset: ())(dataset)


def judge(
    features: np.ndarray | None,
    images: np.ndarray,
    n: int,
    config: Config,
    dataset: Dataset,
    against: Reference | None,
    metrics: Mapping[str, Metric],
    intervals: bool = True,
    show: Show = silent,
    prompts: Sequence[str] = (),
) -> Evaluation:
    """Score images that have been drawn already, from their features; as `evaluate`."""
    about: dict[str, Any] = {"n": n}
    scores: dict[str, Score] = {}
    if against is not None and features is not None and config.features is not None:
        show("scoring", 0, 1)
        with threads(config.threads):
            scores, refused = score(features, against, config.features, config.kid_subset_size, intervals, prompts)
        about |= {"features": against.key["features"], "reference": against.key["images"]}
        about |= {"reference_images": len(against.features), "refused": refused}
    for name, metric in metrics.items():
        if name in scores:
            raise RunError(f"the metric {name!r} has the name of a score that fedray measures; give it another.")
        try:
            value = float(metric(images, dataset.images))
        except Exception as error:  # the user's code
            raise RunError(f"the metric {name!r} failed: {type(error).__name__}: {error}.") from error
        if not np.isfinite(value):
            raise RunError(f"the metric {name!r} gave {value}, which is no finite number.")
        scores[name] = Score(value, n)
    return Evaluation(images, {name: found.to_json() for name, found in scores.items()}, about)


def look_for_copies(
    pool: Pool, images: np.ndarray, trained: np.ndarray, unseen: np.ndarray, show: Show = silent
) -> tuple[Score, np.ndarray, np.ndarray]:
    """Compare samples with their nearest training images.

    Args:
        images: samples, uint8 [n, c, h, w].
        trained, unseen: indices of the dataset's images that were trained on, and of those that were not.

    Returns:
        The share of samples nearer to a training image than 95 % of unseen images are; and, nearest first, the
        samples' own indices and those of their nearest training images.
    """

    def found(looked_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        jobs = [NearestJob(start, looked_at[start : start + 64]) for start in range(0, len(looked_at), 64)]
        parts = zip(
            *_results(pool, nearest_images, Shared({"trained": trained}), jobs, "looking for copies", show), strict=True
        )
        index, distance = map(np.concatenate, parts)
        return index, distance

    index, distance = found(images[:LOOKED_AT])
    real = found(unseen[torch.linspace(0, len(unseen) - 1, min(LOOKED_AT, len(unseen))).long().numpy()])[1]
    share, threshold = copies(distance, real)
    order = np.argsort(distance)
    note = f"within {threshold:.1f} of 255, as {EXPECTED:.0%} of {len(real)} images not trained on are"
    n = len(distance)
    return Score(share, n, (share * (1 - share) / n) ** 0.5, f"{n} images", note), order, index[order]


def _results(pool: Pool, work: Work, shared: Any, jobs: Iterable[Any], phase: str, show: Show) -> Iterator[Any]:
    """The payloads of jobs, in their order. Raises `RunError` for one that failed."""
    jobs = list(jobs)
    show(phase, 0, len(jobs))
    for reply in in_order(pool.map(work, shared, jobs, lambda done: show(phase, done, len(jobs)))):
        if not reply.ok:
            error = RunError(f"{reply.job} could not be made: {reply.row['error']}.")
            error.add_note(reply.row["trace"])
            raise error
        yield reply.fetch()
