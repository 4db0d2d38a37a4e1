"""What a run has released of its clients: privacy.jsonl, with a line before each noise is drawn."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedray.algorithms import Round
from fedray.errors import RunError
from fedray.privacy import ACCOUNTANT, Release, epsilon, exact_epsilon

LEDGER = "privacy.jsonl"


def written(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a ledger. One that a kill cut short does not count: its noise was not drawn yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def add(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a ledger, in place of one that was cut short: it is on disk when this returns."""
    with open(path, "a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


class Spending:
    """The ledger of a run's releases, and what they prove.

    A round that is done again after a crash from the same model, with the same survivors and noise from the run's seed,
    is the same release and counts once. Else it counts again; the clients that were drawn are the same.

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
        self.lines = written(self.path)

    def different(self, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a line for each release: of seeded noise, one for each transcript."""
        lines = [*self.lines, *more]
        seeded = {json.dumps(line, sort_keys=True): line for line in lines if not line["secure_noise"]}
        return [*seeded.values(), *(line for line in lines if line["secure_noise"])]

    def releases(self, *more: dict[str, Any]) -> Counter[Release]:
        """Count what was released, by rounds.

        k releases of a round are about the same draw of clients: like one of it, with noise of σ/√k.
        """
        tries = Counter((line["round"], Release(**line["release"])) for line in self.different(*more))
        return Counter(replace(each, multiplier=each.multiplier / k**0.5) for (_, each), k in tries.items())

    def check(self, round: Round) -> None:
        """Raise `RunError` before a round that would exceed the budget, unless it may be one that was released."""
        again = [line for line in self.lines if line["round"] == round.number + 1 and not line["secure_noise"]]
        self._check(round, self.releases() if again else self.releases(self._line(round)))

    def release(self, round: Round) -> dict[str, float | None]:
        """Write down that a round's noisy sum is about to be released; return what is spent with it.

        Raises:
            RunError: it would exceed the budget; nothing is released.
        """
        line = self._line(round)
        counted = self.releases(line)
        self._check(round, counted)
        add(self.path, line)
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
            "releases": len(self.different()),
        }

    def report(self, secure: bool) -> dict[str, Any]:
        """Return what the whole run has spent, and in which sense."""
        releases, in_sight = self.releases(), Counter[Release]()
        for release, count in releases.items():
            in_sight[release.in_sight] += count
        known = epsilon(in_sight, self.delta)
        return self.spent() | {
            "exact_epsilon": exact_epsilon(releases, self.delta),
            "epsilon_of_known_cohorts": known if known < math.inf else None,
            "neighbours": self.next.neighbours,
            "accountant": ACCOUNTANT,
            "repeatable": not secure,
        }

    def _line(self, round: Round) -> dict[str, Any]:
        return {
            "round": round.number + 1, "release": asdict(self.next), "transcript": round.transcript,
            "secure_noise": round.secure_noise,
        }  # fmt: skip

    def _check(self, round: Round, counted: Counter[Release]) -> None:
        if self.most < math.inf and (found := epsilon(counted, self.delta)) > self.most:
            raise RunError(
                f"round {round.number + 1} would spend ε = {found:.4g} (δ = {self.delta:g}), more than --max-epsilon "
                f"{self.most:g}; the run stops after {round.number} rounds."
            )
