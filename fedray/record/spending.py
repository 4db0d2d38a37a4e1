"""What a run has released of its clients: privacy.jsonl, with a line before each noise is drawn."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedray.algorithms import Round
from fedray.errors import RunError
from fedray.files import write
from fedray.privacy import ACCOUNTANT, Release, epsilon, exact_epsilon

LEDGER = "privacy.jsonl"


class Spending:
    """The ledger of a run's releases, and what they prove.

    A round that is done again after a crash with the same survivors and noise from the run's seed is the same release
    and counts once. With other survivors, or noise from the system's randomness, it counts again.

    Args:
        delta: δ;  most: ε that is not to be exceeded, if any;  publish: writes the ledger where else it must be.
    """

    def __init__(
        self,
        directory: Path,
        release: Release,
        delta: float,
        most: float | None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = directory / LEDGER
        self.next = release
        self.delta = delta
        self.publish = publish
        self.most = math.inf if most is None else most
        text = self.path.read_text() if self.path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if text != "".join(lines):  # cut short by a kill, before its noise was drawn
            write(self.path, "".join(lines))
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def releases(self, *more: dict[str, Any]) -> Counter[Release]:
        """Count what was released: of seeded noise, each round and its survivors once."""
        seeded = {json.dumps(line, sort_keys=True): line for line in (*self.lines, *more) if not line["secure_noise"]}
        every = [*seeded.values(), *(line for line in (*self.lines, *more) if line["secure_noise"])]
        return Counter(Release(**line["release"]) for line in every)

    def check(self, round: Round) -> None:
        """Raise `RunError` before a round that would exceed the budget, whoever takes part."""
        again = [line for line in self.lines if line["round"] == round.number + 1 and not line["secure_noise"]]
        self._check(round, self.releases() if again else self.releases(self._line(round, [])))

    def release(self, round: Round, survivors: list[int]) -> dict[str, float | None]:
        """Write down that a round's noisy sum is about to be released; return what is spent with it.

        Raises:
            RunError: it would exceed the budget; nothing is released.
        """
        line = self._line(round, survivors)
        counted = self.releases(line)
        self._check(round, counted)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.publish()
        self.lines.append(line)
        return self.spent(counted)

    def spent(self, counted: Counter[Release] | None = None) -> dict[str, float | None]:
        """Return ε at δ of all releases: None where there is no bound."""
        counted = self.releases() if counted is None else counted
        found = epsilon(counted, self.delta)
        return {
            "epsilon": found if found < math.inf else None,
            "delta": self.delta,
            "multiplier": self.next.multiplier,
            "releases": counted.total(),
        }

    def report(self, secure: bool) -> dict[str, Any]:
        """Return what the whole run has spent, and in which sense."""
        return self.spent() | {
            "exact_epsilon": exact_epsilon(self.releases(), self.delta),
            "neighbours": self.next.neighbours,
            "accountant": ACCOUNTANT,
            "repeatable": not secure,
        }

    def _line(self, round: Round, survivors: list[int]) -> dict[str, Any]:
        who = sha256(json.dumps(survivors).encode()).hexdigest()
        return {
            "round": round.number + 1, "release": asdict(self.next), "survivors_sha256": who,
            "secure_noise": round.secure_noise,
        }  # fmt: skip

    def _check(self, round: Round, counted: Counter[Release]) -> None:
        if self.most < math.inf and (found := epsilon(counted, self.delta)) > self.most:
            raise RunError(
                f"round {round.number + 1} would spend ε = {found:.4g} (δ = {self.delta:g}), more than --max-epsilon "
                f"{self.most:g}; the run stops after {round.number} rounds."
            )
