"""The Fréchet distance between two sets of features."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features, x [n, d] and y [m, d].

    ‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½), Heusel et al. 2017, equation 6. In factor form, with centred
    features X, Y scaled by 1/√(n − 1): ‖Δμ‖² + ‖X‖² + ‖Y‖² − 2 ‖X Yᵀ‖_*, exact for few samples and without a
    matrix square root. Unbiased covariances, as pytorch-fid has them; computed in float64.

    Raises:
        ValueError: fewer than two samples in a set.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the Fréchet distance needs two samples in each set, not {len(x)} and {len(y)}.")
    mean_x, factor_x = _moments(x)
    mean_y, factor_y = _moments(y)
    nuclear = torch.linalg.matrix_norm(factor_x @ factor_y.T, ord="nuc")
    squared = (mean_x - mean_y).square().sum() + factor_x.square().sum() + factor_y.square().sum() - 2 * nuclear
    return max(0.0, squared.item())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d], and a factor F [min(n, d), d] of the covariance Fᵀ F."""
    features = features.double()
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    if len(centred) > centred.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R  # same covariance, same norms, fewer rows
    return mean, centred
