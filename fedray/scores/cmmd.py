"""CMMD: a kernel distance on CLIP's features (Jayasumana et al. 2024, "Rethinking FID")."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 10.0
SCALE = 1000.0
ROWS = 1024  # rows of a kernel matrix that are in memory at a time


def cmmd(x: Tensor, y: Tensor) -> float:
    """Compute 1000 (k(x, x) + k(y, y) − 2 k(x, y)), means over all pairs of exp(−‖a − b‖² / 2σ²) with σ = 10.

    As the authors' code: of unit vectors, with each feature's pair with itself, so never below 0 and biased by 1/n.

    Args:
        x, y: features [n, d] and [m, d] of a CLIP model, whose lengths do not matter.
    """
    x, y = F.normalize(x.double()), F.normalize(y.double())
    return SCALE * (_mean(x, x) + _mean(y, y) - 2 * _mean(x, y))


def _mean(x: Tensor, y: Tensor) -> float:
    # Of unit vectors ‖a − b‖² = 2 − 2 a·b; the kernels are near 1, so sum what they lack of it.
    sums = [torch.expm1((block @ y.T - 1) / SIGMA**2).sum().item() for block in x.split(ROWS)]
    return float(np.sum(sums)) / (len(x) * len(y))
