"""The kernel distance between two sets of features: KID, where Inception made them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SUBSETS = 100


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subset_size: int, rng: torch.Generator, subsets: int = SUBSETS
) -> tuple[float, float]:
    """Estimate the squared maximum mean discrepancy: its mean and standard deviation over subsets of each set.

    Bińkowski et al. 2018, section 4: kernel (x·y/d + 1)³, the unbiased estimator (it can be below 0). The deviation is
    that of one subset, and no uncertainty of the mean: see `kernel_deviation`.

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


def kernel_deviation(x: np.ndarray, y: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    """Estimate the standard deviation of the kernel distance over draws of x, y being given.

    The delete-group jackknife (Efron 1982) of the estimator over all pairs, to which the mean over subsets tends. Its
    sums over pairs are taken once for each pair of groups.

    Args:
        x, y: features [n, d] and [m, d];  groups: the rows of x in parts, each left out once.
    """
    parts, real = [torch.from_numpy(np.asarray(x[rows], np.float64)) for rows in groups], _doubles(y)
    within = np.array([[_kernel(a, b).sum().item() for b in parts] for a in parts])
    within -= np.diag([_kernel_of_itself(part).sum().item() for part in parts])
    between = np.array([_kernel(part, real).sum().item() for part in parts])
    sizes = np.array([len(part) for part in parts])
    left = []
    for index in range(len(parts)):
        kept = np.arange(len(parts)) != index
        n = sizes[kept].sum()
        left.append(within[kept][:, kept].sum() / (n * (n - 1)) - 2 * between[kept].sum() / (n * len(y)))
    return float(np.std(left)) * (len(parts) - 1) ** 0.5


def _subset(features: np.ndarray, size: int, rng: torch.Generator) -> Tensor:
    # In order, since the features may be memory-mapped.
    chosen = torch.randperm(len(features), generator=rng)[:size].sort().values.numpy()
    return _doubles(features[chosen])


def _doubles(features: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(features, np.float64))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_itself(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def _discrepancy(x: Tensor, y: Tensor) -> float:
    n = len(x)
    within_x, within_y, between = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = (within_x.sum() - within_x.trace() + within_y.sum() - within_y.trace()) / (n * (n - 1))
    return (within - 2 * between.mean()).item()
