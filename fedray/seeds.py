"""The only source of randomness: every draw comes from the run's seed and a key that says what it is for."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from fedray.lazy import torch


def number(seed: int, *key: str | int) -> int:
    """Derive a 63-bit seed from the run's seed and a key such as `("train", round, client)`.

    Hashed, so that neighbouring rounds, clients and seeds have unrelated streams.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose; the same key gives the same draws on every machine, in every process.

    On the CPU also for work on a GPU: what is drawn must not depend on where it is used. torch seeds its
    Mersenne Twister with the low 32 bits, so two of a million keys may share a stream; none depends on another.
    """
    return torch.Generator().manual_seed(number(seed, *key))


def secret(n: int, seed: int | None, *key: str | int) -> np.ndarray:
    """Return n random numbers, uint64, for what must stay hidden: all of the seed and the key count, by SHAKE-256.

    Args:
        seed: the run's; None draws from the system's randomness.
    """
    drawn = os.urandom(8 * n) if seed is None else hashlib.shake_256(repr((seed, *key)).encode()).digest(8 * n)
    return np.frombuffer(drawn, "<u8")


def uniform(words: np.ndarray) -> np.ndarray:
    """Make of random uint64 as many numbers in [0, 1), float64."""
    return (words >> np.uint64(11)) * 2.0**-53


def gaussian(words: np.ndarray) -> np.ndarray:
    """Make of an even number of random uint64 as many from N(0, 1), float64 (Box and Muller 1958)."""
    first, second = uniform(words).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(first + 2.0**-53)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
