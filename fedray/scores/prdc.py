"""Precision and density: do generated images look real?  Recall and coverage: are all real images covered?"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedray.vector import as_tensor

NEIGHBOURS = 5  # k (Naeem et al. 2020)
ROWS = 1024  # rows of a distance matrix that are computed at a time


@dataclass(frozen=True, eq=False)
class Manifold:
    """Real features [m, d], and the distance of each to its k-th nearest other [m]: centres and radii of balls."""

    features: Tensor
    radii: Tensor


def manifold(features: np.ndarray) -> Manifold:
    """Work out the balls of real features. Raises ValueError for k features or fewer."""
    check_count(len(features), "real")
    real = as_tensor(np.asarray(features, np.float32))
    return Manifold(real, _radii(distances(real, real)))


def check_count(n: int, kind: str) -> None:
    """Raise ValueError for k images or fewer."""
    if n <= NEIGHBOURS:
        raise ValueError(f"it needs more than k = {NEIGHBOURS} {kind} images, not {n}")


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute Euclidean distances [n, m] between the rows of x [n, d] and y [m, d], float32."""
    centre = y.mean(0)  # ‖x‖² + ‖y‖² − 2 x·y loses digits far from the origin
    x, y = x - centre, y - centre
    return torch.cat([torch.cdist(x[start : start + ROWS], y) for start in range(0, len(x), ROWS)])


def prdc(real_drawn: Tensor, drawn_drawn: Tensor, radii: Tensor) -> dict[str, float]:
    """Measure precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), with k = 5.

    precision: the share of generated images inside the ball of a real one;  recall: the share of real images inside
    the ball of a generated one;  density: how many real balls a generated image lies in, over k;  coverage: the share
    of real images with a generated one inside their ball. A ball reaches to the k-th nearest neighbour of its own kind.

    Args:
        real_drawn: distances [m, n] from real to generated images;  drawn_drawn: [n, n];  radii: [m], of real images.

    Raises:
        ValueError: k generated images or fewer.
    """
    n = len(drawn_drawn)
    check_count(n, "drawn")
    inside_real = real_drawn < radii[:, None]
    inside_drawn = real_drawn < _radii(drawn_drawn)[None, :]
    return {
        "precision": inside_real.any(0).float().mean().item(),
        "recall": inside_drawn.any(1).float().mean().item(),
        "density": inside_real.sum().item() / (NEIGHBOURS * n),
        "coverage": inside_real.any(1).float().mean().item(),
    }


def _radii(to_others: Tensor) -> Tensor:
    """Find the distance to the k-th nearest other, from distances [n, n] of which a row's smallest is to itself."""
    return torch.cat([
        rows.topk(NEIGHBOURS + 1, largest=False).values[:, -1] for rows in to_others.split(ROWS)
    ])  # fmt: skip
