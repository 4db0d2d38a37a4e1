"""Secure sums: the server learns the sum of the uploads, and none of them (Bonawitz et al. 2017).

A simulation with the protocol's arithmetic and bytes: keys agreed by X25519, masks from SHAKE-256, secrets shared by
Shamir's scheme. All parties are one program, which knows their secrets: a run shows that the sums are right and what
they cost, not that nobody looks. Secrets are new whenever a round is begun: of a client that is lost in one try and
takes part in the next, both would be recovered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedray.algorithms import Folded, Round, Rows, Upload
from fedray.algorithms.folds import Fold
from fedray.algorithms.masks import KEY, SHARE, SHARES, Client, recover, unmask
from fedray.errors import RunError, UserError
from fedray.lazy import torch

MESSAGES = "secure/messages"  # of a client's payload: what the protocol sends beside values


@dataclass
class _Masked:
    """A partial: sums of masked uploads modulo 2^32, by name; numbers by client."""

    sums: dict[str, np.ndarray] = field(default_factory=dict)  # uint32
    rows: list[tuple[int, Rows]] = field(default_factory=list)


@dataclass(frozen=True)
class Secure(Fold):
    """The mean of uploads that the server sees only masked; every client counts alike.

    Uploads travel as rint(2^bits x) modulo 2^32, under masks that cancel in the sum. Those of clients that drop out are
    recovered from shares that the others hold. What clients tell beside tensors (losses, steps) is not protected.

    threshold: the share of a cohort that must take part, so that its sum can be unmasked;  limit: values must be
    smaller, or the client has failed.
    """

    threshold: float
    bits: int = 16
    limit: float = 8.0

    uniform = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"--fold secure:{self.threshold}: the threshold must be above 0 and at most 1.")
        if not (0 < self.limit < math.inf and 0 <= self.bits < 31):
            raise UserError(f"--fold secure: bits ({self.bits}) must be 0 to 30, and limit ({self.limit}) above 0.")

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"sums"})

    @property
    def least(self) -> int:
        return 2  # the sum of one client is its upload

    @property
    def most(self) -> float:
        """How many clients' values certainly add up to less than 2^31: n · limit · 2^bits."""
        return math.ceil(2**31 / (self.limit * 2**self.bits)) - 1

    def step(self, round: Round) -> float:
        return 2.0**-self.bits

    def needed(self, cohort: int) -> int:
        return max(1, math.ceil(self.threshold * cohort - 1e-9))

    def _needed(self, round: Round) -> int:
        return max(self.least, self.needed(len(round.cohort)))

    def exchanged(self, round: Round) -> tuple[int, int]:
        """The others' keys and shares come down; the shares that unmask the sum, one for each of the cohort, go up."""
        n = len(round.cohort)
        return (n - 1) * (KEY + SHARES), n * SHARE

    def seal(self, payload: dict[str, np.ndarray], round: Round, client: int) -> dict[str, np.ndarray]:
        """Mask a client's message, for it alone to see.

        Raises:
            FloatingPointError: a value is not finite, or not below `limit`.
            UserError: there is something else than float32 vectors in it.
        """
        parties = self._parties(round)
        publics = [party.public for party in parties]
        own = parties[round.cohort.index(client)]
        sealed = {MESSAGES: np.frombuffer(own.messages(publics), np.uint8)}
        for name, values in payload.items():
            if values.dtype != np.float32:
                raise UserError("--fold secure masks float32 vectors; leave links out that send something else.")
            if len(values) and not np.abs(values).max() < self.limit:
                raise FloatingPointError(f"the tensor {name!r} has values that are not below {self.limit:g}")
            sealed[name] = own.masked(quantised(values, self.bits), name, publics)
        return sealed

    def start(self, round: Round) -> _Masked:
        return _Masked()

    def add(self, partial: _Masked, upload: Upload, round: Round) -> _Masked:
        masked = {name: tensor.numpy() for name, tensor in upload.tensors.items() if name != MESSAGES}
        return self.merge(partial, _Masked(masked, [(upload.client, upload.rows)]), round)

    def merge(self, first: _Masked, second: _Masked, round: Round) -> _Masked:
        if not first.rows:
            return _Masked({name: total.copy() for name, total in second.sums.items()}, list(second.rows))
        if not second.rows:
            return first
        shapes = [{name: total.shape for name, total in each.sums.items()} for each in (first, second)]
        if shapes[0] != shapes[1]:
            raise RunError(f"clients send {shapes[0]} and {shapes[1]}; a secure sum needs the same tensors of all.")
        sums = {name: total + second.sums[name] for name, total in first.sums.items()}
        return _Masked(sums, first.rows + second.rows)

    def result(self, partial: _Masked, round: Round) -> Folded:
        rows = sorted(partial.rows, key=lambda row: row[0])
        took_part, least = {client for client, _ in rows}, self._needed(round)
        if not round.cohort:
            return Folded({}, {}, [])
        if len(rows) < least:
            raise RunError(
                f"round {round.number + 1}: {len(rows)} of {len(round.cohort)} clients took part, and no fewer than "
                f"{least} can unmask their sum (--fold secure:{self.threshold:g})."
            )
        parties = self._parties(round)
        there = [party for party, client in zip(parties, round.cohort, strict=True) if client in took_part]
        owns: dict[int, bytes] = {}
        secrets: dict[int, bytes] = {}
        for party, client in zip(parties, round.cohort, strict=True):  # of each one secret at most
            asked, which = (owns, 1) if client in took_part else (secrets, 0)
            answers = {holder.place + 1: party.shares[which][holder.place] for holder in there[:least]}
            asked[party.place] = recover(answers)
        publics, sums = [party.public for party in parties], {}
        for name, total in partial.sums.items():
            plain = unmask(total, name, publics, owns, secrets)
            sums[name] = torch.from_numpy(signed(plain, self.bits))
        return Folded(sums, {name: float(len(rows)) for name in sums}, rows)

    def _parties(self, round: Round) -> list[Client]:
        least = self._needed(round)
        key = (round.seed, round.number, round.nonce)
        return [Client.of(key, client, round.cohort, least) for client in round.cohort]


def quantised(values: np.ndarray, bits: int) -> np.ndarray:
    """Return rint(2^bits x) modulo 2^32, uint32."""
    return np.rint(values.astype(np.float64) * 2.0**bits).astype(np.int64).astype(np.uint32)


def signed(total: np.ndarray, bits: int) -> np.ndarray:
    """Return the float64 value of a sum of `quantised` that is below 2^31."""
    return total.view(np.int32) * 2.0**-bits
