"""Masks that hide uploads and cancel in their sum (Bonawitz et al. 2017, figure 4): keys, seeds, and shares of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

FIELD = 2**521 - 1  # of the shares: a Mersenne prime above any secret of 256 bits
SHARE = 66  # bytes of an element of that field
KEY = 32  # bytes of a key
TAG = 16  # bytes by which a message is known to be whole
SHARES = 2 * SHARE + TAG  # bytes of what a client sends for another
CURVE = 2**255 - 19


def x25519(scalar: bytes, point: bytes = (9).to_bytes(32, "little")) -> bytes:
    """Multiply a point of Curve25519 by a secret (RFC 7748, section 5), 32 bytes each."""
    k = int.from_bytes(scalar, "little") & ~7 & ~(1 << 255) | 1 << 254
    u = int.from_bytes(point, "little") & ~(1 << 255)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a % CURVE, c * b % CURVE, a * a % CURVE, b * b % CURVE
        x3, z3 = (da + cb) ** 2 % CURVE, u * (da - cb) ** 2 % CURVE
        e = aa - bb
        x2, z2 = aa * bb % CURVE, e * (aa + 121665 * e) % CURVE
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, -1, CURVE) % CURVE if z2 else 0).to_bytes(32, "little")


def share(secret: bytes, count: int, threshold: int, salt: bytes) -> list[int]:
    """Share a secret among `count` parties, so that any `threshold` of them have it (Shamir 1979): f(1), f(2), ….

    The coefficients of f beyond the secret are drawn by SHAKE-256 from `salt`, which is secret too.
    """
    drawn = hashlib.shake_256(b"coefficients" + salt + secret).digest(80 * (threshold - 1))
    rest = [int.from_bytes(drawn[80 * i : 80 * (i + 1)], "little") % FIELD for i in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "little"), *rest]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % FIELD
        shares.append(value)
    return shares


def recover(shares: Mapping[int, int]) -> bytes:
    """Return the secret from shares by place, from 1: f(0), by Lagrange's formula."""
    weights = _at_zero(tuple(shares))
    total = sum(value * weight for value, weight in zip(shares.values(), weights, strict=True)) % FIELD
    return total.to_bytes(SHARE, "little")[:KEY]


@lru_cache(16)
def _at_zero(places: tuple[int, ...]) -> list[int]:
    """Return the values at 0 of Lagrange's polynomials, which are 1 at one of the places and 0 at the others."""
    weights = []
    for i in places:
        above, below = 1, 1
        for j in places:
            if j != i:
                above, below = above * j % FIELD, below * (j - i) % FIELD
        weights.append(above * pow(below, -1, FIELD) % FIELD)
    return weights


def mask(seed: bytes, name: str, size: int) -> np.ndarray:
    """Stretch a seed to `size` uniform numbers, uint32: one stream for each tensor."""
    return np.frombuffer(hashlib.shake_256(seed + name.encode()).digest(4 * size), np.uint32)


@lru_cache(100_000)
def agreed(own: bytes, public: bytes) -> bytes:
    """Return the seed that the holders of two key pairs agree on."""
    return hashlib.sha256(x25519(own, public)).digest()


@lru_cache(100_000)
def public_of(secret: bytes) -> bytes:
    return x25519(secret)


@dataclass(frozen=True)
class Client:
    """A client in one round: what it alone knows.

    place: in the cohort, from 0;  secret: its half of the seeds that it agrees on with others;  own: the seed of a mask
    of its own, which protects an upload that arrives after the server asked for its secret.
    """

    place: int
    cohort: tuple[int, ...]
    threshold: int
    secret: bytes
    own: bytes

    @classmethod
    @lru_cache(256)
    def of(cls, key: tuple[int | str, ...], client: int, cohort: tuple[int, ...], threshold: int) -> Client:
        """Make a client's secrets, new whenever a round is begun, as `key` is."""
        drawn = hashlib.shake_256(repr(("secure", *key, client)).encode()).digest(2 * KEY)
        return cls(cohort.index(client), cohort, threshold, drawn[:KEY], drawn[KEY:])

    @property
    def public(self) -> bytes:
        return public_of(self.secret)

    def masked(self, values: np.ndarray, name: str, publics: Sequence[bytes]) -> np.ndarray:
        """Return values, uint32, under the client's masks, modulo 2^32."""
        total = values + mask(self.own, name, len(values))
        for place, public in enumerate(publics):
            if place != self.place:
                pair = mask(agreed(self.secret, public), name, len(values))
                total = total + pair if self.place < place else total - pair
        return total

    def messages(self, publics: Sequence[bytes]) -> bytes:
        """Return what it sends before its upload: its key, and for each other client encrypted shares of its secrets.

        Encrypted and then authenticated by SHAKE-256 under the seed that both agree on; `SHARES` bytes for each.
        """
        sent = [self.public]
        for place, (first, second) in enumerate(zip(*self.shares, strict=True)):
            if place != self.place:
                key = agreed(self.secret, publics[place]) + bytes([self.place < place])
                pad = np.frombuffer(hashlib.shake_256(key + b"pad").digest(2 * SHARE), np.uint8)
                plain = np.frombuffer(first.to_bytes(SHARE, "little") + second.to_bytes(SHARE, "little"), np.uint8)
                hidden = (plain ^ pad).tobytes()
                sent += [hidden, hashlib.shake_256(key + b"tag" + hidden).digest(TAG)]
        return b"".join(sent)

    @cached_property
    def shares(self) -> tuple[list[int], list[int]]:
        """Shares of its two secrets, one of each for every client of the cohort."""
        count = len(self.cohort)
        return share(self.secret, count, self.threshold, b"0"), share(self.own, count, self.threshold, b"1")


def unmask(
    total: np.ndarray, name: str, publics: Sequence[bytes], owns: Mapping[int, bytes], secrets: Mapping[int, bytes]
) -> np.ndarray:
    """Remove what masks are left in the sum of those who took part.

    Args:
        publics: keys of the whole cohort, by place.
        owns: recovered seeds, by place, of those who took part.
        secrets: recovered secrets, by place, of those who dropped out: their masks with the others did not cancel.
    """
    total = total.copy()
    for seed in owns.values():
        total -= mask(seed, name, len(total))
    for lost, secret in secrets.items():
        for place in owns:
            pair = mask(agreed(secret, publics[place]), name, len(total))
            if lost < place:  # as it would have added, and the other has subtracted
                total += pair
            else:
                total -= pair
    return total
