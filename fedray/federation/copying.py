"""The audit of samples: do they copy what was trained on, in pixels and in features?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedray.federation.audit import kinds
from fedray.federation.evaluation import Show, nearest_of, sample, silent, unseen_of
from fedray.federation.plan import Plan
from fedray.federation.pool import Pool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import Shared
from fedray.record.run import Row
from fedray.scores.nearest import copies, excess, nearest_features


class Copies(NamedTuple):
    """Samples beside their nearest training images, in pixels or in features.

    share: of the samples, those that are nearer than the nearest 5 % of images that nobody trained on;  deviation: its
    standard deviation;  expected: the share of new images;  p: of so many if samples are distributed as new images are,
    which smooth ones are not: they are nearer to all images;  images, nearest: uint8
    [n, c, h, w], the samples that are nearest first, and their nearest training images.
    """

    share: float
    deviation: float
    expected: float
    p: float
    images: np.ndarray
    nearest: np.ndarray


def audit_copies(
    pool: Pool,
    model: Shared,
    plan: Plan,
    rows: list[Row],
    sampling: Sampling,
    features: np.ndarray | None,
    show: Show = silent,
) -> dict[str, Copies]:
    """Sample images from a model, and look for copies among them: by "pixels", and by "features" if there are some.

    Args:
        rows: of the run's rounds: samples are compared with images of clients that took part.
        features: of all images of the dataset [n, d], by the network that the pool was opened with; or None.

    Raises:
        UserError: as of `kinds`.
        RunError: an image could not be made.
    """
    made, images = sample(pool, model, sampling, show, features=features is not None)
    trained, others = kinds(plan, rows)
    unseen = unseen_of(others)
    index, distance = nearest_of(pool, images, trained, show)
    found = {"pixels": _judged(plan, images, index, distance, nearest_of(pool, unseen, trained, show)[1])}
    if features is not None and made is not None:
        there = np.asarray(features[trained])
        row, distance = nearest_features(made, there)
        real = nearest_features(np.asarray(features[unseen]), there)[1]
        found["features"] = _judged(plan, images, trained[row], distance, real)
    return found


def _judged(plan: Plan, images: np.ndarray, index: np.ndarray, distance: np.ndarray, real: np.ndarray) -> Copies:
    share, deviation, _, expected = copies(distance, real)
    order = np.argsort(distance, kind="stable")
    p = excess(distance, real)
    return Copies(share, deviation, expected, p, images[order], plan.dataset.images[index[order]])
