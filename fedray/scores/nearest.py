"""The nearest training images of generated ones: does a model reproduce what it was trained on?"""

import numpy as np
import torch
from torch import Tensor

ROWS = 2048  # training images that are compared at a time
LOOKED_AT = 256  # generated images, and real ones, whose nearest are sought
EXPECTED = 0.05  # share of real images, not trained on, that lie below the threshold


def nearest(images: np.ndarray, dataset: np.ndarray, trained: np.ndarray, mirrored: bool) -> tuple[np.ndarray, ...]:
    """Find the nearest training image of each of images, uint8 [n, c, h, w]: its index, and how far it is.

    Distances are root mean squares of pixel differences (0 to 255).

    Args:
        dataset: uint8 [m, c, h, w], memory-mapped, of which `trained` indexes those that were trained on.
        mirrored: training mirrored them, so compare with both sides.
    """
    queries = _rows(images)
    if mirrored:
        queries = torch.cat([queries, _rows(images[..., ::-1])])
    best = torch.full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(trained), ROWS):
        chosen = trained[start : start + ROWS]
        distance, position = torch.cdist(queries, _rows(dataset[chosen])).min(1)
        closer = distance < best
        best[closer], index[closer] = distance[closer], torch.from_numpy(chosen)[position[closer]]
    if mirrored:
        (plain, other), (index_plain, index_other) = best.chunk(2), index.chunk(2)
        best, index = torch.minimum(plain, other), torch.where(other < plain, index_other, index_plain)
    return index.numpy(), (best / queries.shape[1] ** 0.5).numpy()


def copies(drawn: np.ndarray, real: np.ndarray) -> tuple[float, float, float, float]:
    """Measure the share of generated images that are suspiciously near to a training image.

    The threshold is the (m + 1)/20-th smallest of m real distances, interpolated, below which one more of their kind
    lies with a chance of exactly 5 % (if m ≥ 19; of fewer it is the smallest, and the chance 1/(m + 1)): a model that
    generates new images is expected to have that share there, and one that copies has more.

    Meehan, Chaudhuri and Dasgupta (2020) compare all distances of both kinds, by their ranks. Smooth samples, which are
    nearer to all images, move that test without a copy among them, and few copies among many new samples do not; here
    those count that are as near as copies are.

    Args:
        drawn, real: distances of generated images [n], and of real images that were held out [m], to the nearest
            training image.

    Returns:
        The share; its standard deviation √(p (1 − p) (1/n + 1/m)), over draws of both; the threshold; the share of new
        images that is expected.
    """
    n, m = len(drawn), len(real)
    threshold = float(np.quantile(real, EXPECTED, method="weibull"))
    share = float((drawn <= threshold).mean())
    return share, (share * (1 - share) * (1 / n + 1 / m)) ** 0.5, threshold, max(EXPECTED, 1 / (m + 1))


def excess(drawn: np.ndarray, real: np.ndarray) -> float:
    """Return the chance that as many of n new images lie within the ⌊(m + 1) / 20⌋-th smallest of m real distances.

    That is beta-binomial, whatever the distances, if both are of one distribution; of fewer than 19 real ones,
    the smallest is taken.
    """
    from scipy.stats import betabinom  # takes a second to import

    n, m = len(drawn), len(real)
    place = max(1, int(EXPECTED * (m + 1)))
    within = int((drawn < np.partition(real, place - 1)[place - 1]).sum())
    return float(betabinom.sf(within - 1, n, place, m + 1 - place))


def nearest_features(features: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest of `others` [m, d] of each of features [n, d]: its row, and the Euclidean distance."""
    queries = torch.from_numpy(features).float()
    best, index = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(others), ROWS):
        distance, position = torch.cdist(queries, torch.from_numpy(others[start : start + ROWS]).float()).min(1)
        closer = distance < best
        best[closer], index[closer] = distance[closer], start + position[closer]
    return index.numpy(), best.numpy()


def _rows(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).flatten(1).float()
