"""Evaluation: samples of a model, their scores, and a search for copies. The pool does all of its work as jobs."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError, UserError
from fedray.federation.pool import Pool, failure, in_order
from fedray.federation.sampling import FeatureJob, NearestJob, Sampling, dataset_features, nearest_images, sample_batch
from fedray.federation.worker import Shared, Work, threads
from fedray.scores import networks
from fedray.scores.metrics import Score, over_draws
from fedray.scores.nearest import LOOKED_AT, copies
from fedray.scores.reference import Reference, reference
from fedray.scores.scoring import score

LARGE = 2**28  # bytes of features from which on they are in a file
GRID = 64  # images that are kept of every evaluation, for its picture

Show = Callable[[str, float, float], None]  # phase, how much of it is done, of how much
Metric = Callable[[np.ndarray, np.ndarray], float]  # a user's own: of samples and the dataset's images, uint8


def silent(phase: str, done: float, total: float) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Scoring:
    """Settings of scores. The pool that makes the features must have been opened with the same settings."""

    features: str
    """Name of the feature network."""
    inception_weights: str | None
    """File of Inception's weights; None takes torch's hub cache."""
    kid_subset_size: int
    """Images in each of the subsets that the kernel distance is averaged over."""
    batch_size: int
    """Images in a batch of the reference's features."""
    threads: int
    """Threads that features and scores are computed with."""
    gpu: bool
    """Features are computed on GPUs."""

    @classmethod
    def of(cls, config: Config) -> "Scoring | None":
        """Score as a run does; None where it names no features."""
        if config.features is None:
            return None
        return cls(
            config.features,
            config.inception_weights,
            config.kid_subset_size,
            config.eval_batch_size,
            config.threads,
            bool(config.gpus_per_actor),
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The dataset that samples are compared with, and its reference (None for no scores but `metrics`)."""

    dataset: Dataset
    scoring: Scoring | None = None
    reference: Reference | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """A user's own scores, which get all images."""
    intervals: bool = True
    """Whether standard deviations are worked out."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Some of the images, their scores, and `about`: count, sampler, seed, features, reference, what was refused."""

    images: np.ndarray  # uint8 [at least min(n, 64), c, h, w]
    scores: dict[str, Score] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def check_features(config: Config, dataset: Dataset) -> None:
    """Raise `UserError` unless a run's features, if it is to be scored, can judge these images."""
    if config.features is not None and config.evaluate_samples:
        networks.check(config.features, config.inception_weights, dataset.images)


def open_reference(scoring: Scoring, dataset: Dataset, pool: Pool, show: Show = silent) -> Reference:
    """Open the statistics that scores are taken against; the pool works them out unless this node has them cached.

    The key holds all that the bits of features depend on, but for the kind of CPU.

    Raises:
        UserError: there are too few images, or their features are not finite.
        RunError: features could not be made.
    """
    n = len(dataset)
    key = {
        "images": dataset.sha256,
        "features": networks.key(scoring.features, scoring.inception_weights, dataset.images),
        "batch": scoring.batch_size,
        "threads": scoring.threads,
        "gpu": scoring.gpu,
    }
    make = partial(features_of, scoring.batch_size, n, pool, show)
    try:
        return reference(f"reference features ({scoring.features})", n, key, make)
    except ValueError as error:
        raise UserError(f"the {n} images of this dataset cannot be scored against: {error}.") from None


def features_of(batch_size: int, n: int, pool: Pool, show: Show = silent) -> Iterator[np.ndarray]:
    """Yield features of the n images that the pool's workers have as their dataset, in batches."""
    jobs = [FeatureJob(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    return _results(pool, dataset_features, Shared({}), jobs, "features", show)


def sample(
    pool: Pool,
    model: Shared,
    sampling: Sampling,
    show: Show = silent,
    keep: int | None = None,
    features: bool = False,
) -> tuple[np.ndarray | None, np.ndarray]:
    """Sample images from a model: the first `keep` of them, uint8 [keep, c, h, w], after the features [n, d] of all.

    The same whatever the pool: image i is in batch i // B, for prompt i modulo their number. Large features are in a
    temporary file, not in memory.

    Args:
        model: what the pool's workers load.
        keep: None keeps all.
        features: whether to make features, by the network that the pool was opened with; else they are None.

    Raises:
        RunError: a batch could not be generated.
    """
    total = sampling.n * sampling.repeats
    jobs = sampling.jobs(features, total if keep is None else min(keep, total))
    table, row, images = None, 0, []
    for made, some in _results(pool, sample_batch, model, jobs, "sampling", show, sampling.load):
        images.append(some)
        if features:
            table = _table(total, made.shape[1]) if table is None else table
            table[row : row + len(made)] = made
            row += len(made)
    return table, np.concatenate(images)


def _table(n: int, d: int) -> np.ndarray:
    """Make room for features [n, d]: in memory, or from 256 MB on in a temporary file."""
    if n * d * 4 < LARGE:
        return np.empty((n, d), np.float32)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, n * d * 4)  # a full disk is an error here, and would be a crash later
        return np.memmap(file, np.float32, "r+", shape=(n, d))


def evaluate(
    pool: Pool,
    model: Shared,
    sampling: Sampling,
    comparison: Comparison,
    keep: int = GRID,
    show: Show = silent,
) -> Evaluation:
    """Sample images from a model and score them; with several sets, each of them.

    Args:
        model: what the pool's workers load.
        keep: how many images to return, of the first set; all, where the user's own metrics need them.

    Raises:
        RunError: a batch could not be generated, or a metric of the user's failed.
    """
    n, prompts = sampling.n, sampling.prompts_of(0, sampling.n)
    keep = n * sampling.repeats if comparison.metrics else min(keep, n)
    features, images = sample(pool, model, sampling, show, keep, comparison.reference is not None)
    sets = [
        score_images(images[rows], None if features is None else features[rows], comparison, n, prompts, show)
        for rows in (slice(number * n, number * n + n) for number in range(sampling.repeats))
    ]
    about = sets[0].about | {"sampler": sampling.sampler, "sampling_steps": sampling.steps, "seed": sampling.seed}
    about |= {"draws": sampling.repeats} if sampling.repeats > 1 else {}
    return Evaluation(sets[0].images, over_draws([each.scores for each in sets]), about)


def prompts_of(config: Config, dataset: Dataset | None = None) -> tuple[str, ...]:
    """Return the prompts that a run's samples are for: what its task says; none where it knows no prompts.

    `dataset` is the task's, if it is loaded already.
    """
    prompts = getattr(config.task, "prompts", None)
    if prompts is None:
        return ()
    return tuple(prompts(config.task.dataset() if dataset is None else dataset))


def scored(config: Config, n: int, dataset: Dataset) -> Sampling:
    """Say how n images are sampled for scores: for the task's prompts in turn, or each class as often as in the data.

    The names of classes, where they are known, are what scores compare with as prompts.
    """
    sampling = Sampling.of(config, n, prompts_of(config, dataset))
    if not sampling.labels:
        return sampling
    task: Any = config.task
    labels: tuple[int, ...] = task.class_labels(n, dataset)
    names: dict[int, str] = getattr(task, "class_names", lambda dataset: {})(dataset)
    return replace(sampling, labels=labels, prompts=tuple(names[label] for label in labels) if names else ())


def score_images(
    images: np.ndarray,
    features: np.ndarray | None,
    comparison: Comparison,
    n: int,
    prompts: Sequence[str] = (),
    show: Show = silent,
) -> Evaluation:
    """Score n images that there are already, from their features [n, d].

    Args:
        images: the first of them, uint8 [m, c, h, w]; all, where there are metrics of the user's own.
        prompts: what each was generated for, if for anything.

    Raises:
        RunError: a metric of the user's failed.
    """
    about: dict[str, Any] = {"n": n}
    scores: dict[str, Score] = {}
    scoring, against = comparison.scoring, comparison.reference
    if scoring is not None and against is not None and features is not None:
        show("scoring", 0, 1)
        name, size = scoring.features, scoring.kid_subset_size
        with threads(scoring.threads):
            scores, refused = score(features, against, name, size, comparison.intervals, prompts)
        about |= {"features": against.key["features"], "reference": against.key["images"]}
        about |= {"reference_images": len(against.features), "refused": refused}
    for name, metric in comparison.metrics.items():
        if name in scores:
            raise RunError(f"the metric {name!r} has the name of a score that fedray measures; give it another.")
        try:
            value = float(metric(images, comparison.dataset.images))
        except Exception as error:  # the user's code
            raise RunError(f"the metric {name!r} failed: {type(error).__name__}: {error}.") from error
        if not np.isfinite(value):
            raise RunError(f"the metric {name!r} gave {value}, which is no finite number.")
        scores[name] = Score(value, n)
    return Evaluation(images, scores, about)


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
    index, distance = nearest_of(pool, images[:LOOKED_AT], trained, show)
    real = nearest_of(pool, unseen_of(unseen), trained, show)[1]
    share, deviation, threshold, expected = copies(distance, real)
    order = np.argsort(distance)
    note = f"within {threshold:.1f} of 255, where {expected:.1%} are expected of new images"
    if (far := (distance > np.quantile(real, 0.95)).mean()) > 0.5:  # as noise is
        note += f"; {far:.0%} are farther from all images than 95% of real ones, so that few copies say nothing"
    over = f"{len(distance)} samples and {len(real)} images not trained on"
    return Score(share, len(distance), deviation, over, note), order, index[order]


def nearest_of(
    pool: Pool, queries: np.ndarray, trained: np.ndarray, show: Show = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest training image of each query: its index, and how far it is.

    Args:
        queries: images, uint8 [n, c, h, w], or indices of images of the dataset [n].
        trained: indices of the dataset's images that were trained on.
    """
    jobs = [NearestJob(start, queries[start : start + 64]) for start in range(0, len(queries), 64)]
    parts = zip(
        *_results(pool, nearest_images, Shared({"trained": trained}), jobs, "looking for copies", show), strict=True
    )
    index, distance = map(np.concatenate, parts)
    return index, distance


def unseen_of(unseen: np.ndarray) -> np.ndarray:
    """Take at most `LOOKED_AT` of the images that were not trained on, evenly."""
    return unseen[torch.linspace(0, len(unseen) - 1, min(LOOKED_AT, len(unseen))).long().numpy()]


def _results(
    pool: Pool,
    work: Work,
    shared: Any,
    jobs: Iterable[Any],
    phase: str,
    show: Show,
    load: Callable[[Any], Any] = lambda job: job,
) -> Iterator[Any]:
    """Yield the payloads of jobs, in their order. Raises `RunError` for one that failed, or the user's mistake."""
    jobs = list(jobs)
    show(phase, 0, len(jobs))
    for reply in in_order(pool, work, shared, jobs, lambda done: show(phase, done, len(jobs)), load):
        if not reply.ok:
            error = reply.row["error"]
            raise failure(f"{reply.job} could not be made: {error}.", error, reply.row["trace"])
        yield reply.fetch()
