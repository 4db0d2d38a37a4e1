"""The only source of randomness: every draw comes from the run's seed and a key that says what it is for."""

from __future__ import annotations

import hashlib

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
