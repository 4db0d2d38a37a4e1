"""The kernel distance between two sets of features: KID, where Inception made them."""

import numpy as np
import torch
from torch import Tensor

SUBSETS = 100


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subset_size: int, rng: torch.Generator, subsets: int = SUBSETS
) -> tuple[float, float]:
    """Estimate the squared maximum mean discrepancy: its mean and standard deviation over subsets of each set.

    Bińkowski et al. 2018, section 4: kernel (x·y/d + 1)³, the unbiased estimator (it can be below 0).

    Args:
        x, y: features [n, d] and [m, d].

    Raises:
        ValueError: a set is smaller than the subsets.
    """
    if min(len(x), len(y)) < subset_size:
        raise ValueError(
            f"its subsets have {subset_size} images and there are {min(len(x), len(y))} (--kid-subset-size)"
        )
    drawn = [_discrepancy(_subset(x, subset_size, rng), _subset(y, subset_size, rng)) for _ in range(subsets)]
    return float(np.mean(drawn)), float(np.std(drawn))


def _subset(features: np.ndarray, size: int, rng: torch.Generator) -> Tensor:
    # In order, since the features may be memory-mapped.
    chosen = torch.randperm(len(features), generator=rng)[:size].sort().values.numpy()
    return torch.from_numpy(np.asarray(features[chosen], np.float64))


def _discrepancy(x: Tensor, y: Tensor) -> float:
    n, d = x.shape
    within_x, within_y, between = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (within_x.sum() - within_x.trace() + within_y.sum() - within_y.trace()) / (n * (n - 1))
    return (within - 2 * between.mean()).item()
