"""Precision and density: do generated images look real?  Recall and coverage: are all real images covered?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedray.vector import as_tensor

NEIGHBOURS = 5  # k (Naeem et al. 2020)
ROWS = 1024  # rows of a distance matrix that are in memory at a time


@dataclass(frozen=True, eq=False)
class Manifold:
    """Real features [m, d], and the distance of each to its k-th nearest other [m]: centres and radii of balls."""

    features: Tensor
    radii: Tensor


def manifold(features: np.ndarray) -> Manifold:
    """Work out the balls of real features. Raises ValueError for k features or fewer."""
    check_count(len(features), "real")
    real = as_tensor(np.asarray(features, np.float32))
    return Manifold(real, torch.cat([_radii(block) for block in distances(real, real)]))


def check_count(n: int, kind: str) -> None:
    """Raise ValueError for k images or fewer."""
    if n <= NEIGHBOURS:
        raise ValueError(f"it needs more than k = {NEIGHBOURS} {kind} images, not {n}")


def distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Yield Euclidean distances between the rows of x [n, d] and y [m, d]: float32 blocks [at most 1,024, m]."""
    centre = y.mean(0)  # ‖x‖² + ‖y‖² − 2 x·y loses digits far from the origin
    y = y - centre
    for start in range(0, len(x), ROWS):
        yield torch.cdist(x[start : start + ROWS] - centre, y)


def prdc(real: Manifold, drawn: Tensor, left_out: Sequence[np.ndarray] = ()) -> list[dict[str, float]]:
    """Measure precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), with k = 5.

    precision: the share of generated images inside the ball of a real one;  recall: the share of real images inside
    the ball of a generated one;  density: how many real balls a generated image lies in, over k;  coverage: the share
    of real images with a generated one inside their ball. A ball reaches to the k-th nearest neighbour of its own kind.

    Args:
        drawn: features of generated images, float32 [n, d].
        left_out: groups of generated images, to measure also without each of them.

    Returns:
        The measures of all generated images, and then without each group. No n × n matrix is in memory.

    Raises:
        ValueError: k generated images or fewer.
    """
    kept = torch.ones(1 + len(left_out), len(drawn), dtype=torch.bool)  # [cases, n]
    for case, group in enumerate(left_out, 1):
        kept[case, group] = False
    check_count(int(kept.sum(1).min()), "drawn")
    blocks = [[_radii(block[:, case]) for case in kept] for block in distances(drawn, drawn)]
    radii = [torch.cat(parts)[case] for parts, case in zip(zip(*blocks, strict=True), kept, strict=True)]
    balls = torch.zeros(len(drawn), dtype=torch.int64)  # real ones that each generated image lies in
    recalled, covered = np.zeros(len(kept)), np.zeros(len(kept))
    for block, radius in zip(distances(real.features, drawn), real.radii.split(ROWS), strict=True):
        inside_real = block < radius[:, None]
        balls += inside_real.sum(0)
        for index, case in enumerate(kept):
            recalled[index] += (block[:, case] < radii[index]).any(1).sum().item()
            covered[index] += inside_real[:, case].any(1).sum().item()
    m = len(real.features)
    return [
        {
            "precision": (balls[case] > 0).float().mean().item(),
            "recall": recalled[index] / m,
            "density": balls[case].sum().item() / (NEIGHBOURS * int(case.sum())),
            "coverage": covered[index] / m,
        }
        for index, case in enumerate(kept)
    ]


def _radii(to_others: Tensor) -> Tensor:
    """Find the distance to the k-th nearest other, from distances [b, n] of which a row's smallest is to itself."""
    return to_others.topk(NEIGHBOURS + 1, largest=False).values[:, -1]
