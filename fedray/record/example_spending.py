"""What clients that add noise themselves have released of their examples: example-privacy.jsonl, written before."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.algorithms import Round
from fedray.errors import RunError
from fedray.privacy import ACCOUNTANT, Release, epsilon
from fedray.record.run import Row
from fedray.record.spending import add, written

LEDGER = "example-privacy.jsonl"


@dataclass(frozen=True)
class Try:
    """What a client that trains in a round releases of its examples: so many noisy sums, each of examples drawn anew.

    A try that ends early counts as a whole one.
    """

    release: Release
    steps: int

    def epsilon(self, times: int, delta: float) -> float:
        """Return ε at δ of so many tries; infinite without noise."""
        return epsilon({self.release: self.steps * times}, delta) if self.steps * times else 0.0


class ExampleSpending:
    """The ledger of clients' tries, and what they prove.

    A try counts from the moment at which the client may begin: the server may have seen what it sent, or why it failed,
    also where its process was lost later, or the whole run was. With noise from the run's seed, tries of a round that
    start from the same message and the same memories make the same draws and the same noise: they are one release, and
    count once. Others have draws and noise of their own, and each counts.

    Args:
        try_of: of a client;  delta: δ;  most: ε that no client is to exceed, if any;  publish: writes the ledger where
            else it must be.
    """

    def __init__(
        self,
        directory: Path,
        try_of: Callable[[int], Try],
        delta: float,
        most: float | None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = directory / LEDGER
        self.try_of = try_of
        self.delta = delta
        self.publish = publish
        self.most = math.inf if most is None else most
        self.tries = Counter[int]()  # by client
        self._rounds: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)  # their lines, by number
        for line in written(self.path):
            self._count(line)

    def begin(self, round: Round, clients: Collection[int]) -> None:
        """Write down that these clients are about to train, where that is not a release that was written down before.

        Raises:
            RunError: one of them would exceed the budget; none is to begin.
        """
        if not round.secure_noise:
            same = (line for line in self._rounds[round.number + 1] if line["transcript"] == round.transcript)
            clients = set(clients).difference(*(line["clients"] for line in same if not line["secure_noise"]))
        if not clients:
            return
        for client in clients if self.most < math.inf else ():
            if (found := self._epsilon(client, 1)) > self.most:
                raise RunError(
                    f"round {round.number + 1} would spend ε = {found:.4g} (δ = {self.delta:g}) of examples of client "
                    f"{client}, more than --max-epsilon {self.most:g}; the run stops after {round.number} rounds."
                )
        line = {
            "round": round.number + 1, "clients": sorted(clients), "transcript": round.transcript,
            "secure_noise": round.secure_noise,
        }  # fmt: skip
        add(self.path, line)
        self.publish()
        self._count(line)

    def tell(self, row: Row) -> None:
        """Write into a round's row what each of its clients has spent until then, and the largest of all clients."""
        for client in row["clients"]:
            if client["client"] in self.tries:
                client["epsilon"] = self._finite(self._epsilon(client["client"]))
        row["example_privacy"] = self._largest(self.tries)

    def report(self, secure: bool) -> dict[str, Any]:
        """Return what the whole run has spent: the largest ε, and that of each client."""
        clients = sorted(self.tries)
        return self._largest(clients) | {
            "neighbours": "one example of a client more or less",
            "accountant": ACCOUNTANT,
            "repeatable": not secure,
            "clients": {client: self._finite(self._epsilon(client)) for client in clients},
        }

    def _count(self, line: dict[str, Any]) -> None:
        self._rounds[line["round"]].append(line)
        self.tries.update(line["clients"])

    def _epsilon(self, client: int, more: int = 0) -> float:
        return self.try_of(client).epsilon(self.tries[client] + more, self.delta)

    def _largest(self, clients: Iterable[int]) -> dict[str, Any]:
        found = max(map(self._epsilon, clients), default=0.0)
        return {"epsilon": self._finite(found), "delta": self.delta}

    def _finite(self, found: float) -> float | None:
        return found if found < math.inf else None
