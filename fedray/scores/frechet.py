"""The Fréchet distance between two sets of features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 4096  # features that are read at a time
SIZES = 15  # of subsets that an extrapolation is made from (Chong and Forsyth 2020, section 4)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The Gaussian fitted to features: mean [d], and a factor F [at most d, d] of its covariance Fᵀ F, in float64."""

    mean: Tensor
    factor: Tensor


def gaussian(features: np.ndarray, chosen: np.ndarray | None = None) -> Gaussian:
    """Fit a Gaussian, with the unbiased covariance, to features [n, d] (which may be memory-mapped), or some of them.

    The factor is the R of the QR decomposition of the centred features over √(n − 1), taken over them in parts: the
    same covariance and norms, and no n × d matrix in memory.

    Raises:
        ValueError: fewer than two samples, or features that are not finite.
    """
    n, d = len(features) if chosen is None else len(chosen), features.shape[1]
    if n < 2:
        raise ValueError(f"a Fréchet distance needs at least two images on each side, not {n}")
    mean = sum((part.sum(0) for part in _parts(features, chosen)), torch.zeros(d, dtype=torch.float64)) / n
    if not torch.isfinite(mean).all():
        raise ValueError("the features are not finite")
    factor = torch.zeros(0, d, dtype=torch.float64)
    for part in _parts(features, chosen):
        factor = torch.cat([factor, (part - mean) / (n - 1) ** 0.5])
        if len(factor) > d:
            factor = torch.linalg.qr(factor, mode="r").R
    return Gaussian(mean, factor)


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """Compute ‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½), Heusel et al. 2017, equation 6.

    In factor form, with Σ = Fᵀ F: ‖Δμ‖² + ‖F_x‖² + ‖F_y‖² − 2 ‖F_x F_yᵀ‖_* (nuclear norm): exact for few samples,
    and without a matrix square root, which SciPy changes from version to version.
    """
    nuclear = torch.linalg.svdvals(x.factor @ y.factor.T).sum()
    squared = (x.mean - y.mean).square().sum() + x.factor.square().sum() + y.factor.square().sum() - 2 * nuclear
    return max(0.0, squared.item())


def extrapolated(features: np.ndarray, reference: Gaussian, rng: torch.Generator) -> float:
    """Extrapolate the Fréchet distance of features [n, d] to infinitely many samples: FID∞ of Chong and Forsyth 2020.

    Its bias falls as 1/n, so it is the intercept of a line through the distances of 15 random subsets over 1/n, of
    n/10 to n samples (at least 2 d: below, the bias is no line).

    Raises:
        ValueError: fewer than 4 d samples.
    """
    n, d = features.shape
    if n < 4 * d:
        raise ValueError(f"it needs at least 4 × {d} images, four for each dimension, not {n}")
    sizes = np.linspace(max(n // 10, 2 * d), n, SIZES).round().astype(int)
    subsets = [torch.randperm(n, generator=rng)[:size].sort().values.numpy() for size in sizes]
    measured = [frechet_distance(gaussian(features, chosen), reference) for chosen in subsets]
    return float(np.polynomial.Polynomial.fit(1 / sizes, measured, 1)(0))


def _parts(features: np.ndarray, chosen: np.ndarray | None) -> Iterator[Tensor]:
    """Yield the features, or those chosen, some rows at a time."""
    for start in range(0, len(features) if chosen is None else len(chosen), ROWS):
        rows = slice(start, start + ROWS)
        yield torch.from_numpy(np.asarray(features[rows if chosen is None else chosen[rows]], np.float64))
