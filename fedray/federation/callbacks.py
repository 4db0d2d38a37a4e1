"""Callbacks: what a user has done in Python as a run goes on. They may stop it, and change nothing else."""

import copy
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedray.errors import RunError, UserError, check_name, reason
from fedray.record.run import Row
from fedray.scores.metrics import higher_is_better


class Callback:
    """Methods that a run calls as it goes on; derive, and override some.

    The first three return None, or why the run is to end after this round: then it is evaluated as after its last
    round, its model is written, and its result says why it ended. It can be resumed, up to the rounds of its settings.

    A callback runs in the process that leads the run. With actors that is another one, which has a copy of it: what it
    keeps stays there. It gets copies, so what it changes is not in the record. A round that is done again, since the
    run was killed before the round was saved, is told again. The ε of noise does not cover what callbacks see: when
    they stop a run may tell of the clients' losses.
    """

    def on_start(self, rows: Sequence[Row]) -> None:
        """A run begins, or is resumed after these rows (of rounds.jsonl)."""

    def on_client(self, client: Row) -> str | None:
        """A client's part of a round is complete. Called in the cohort's order: the same wherever they were trained.

        client: one of a row's "clients": client, loss, steps, seconds, bytes_up, outcome ("ok", or why it is left out)…
        """

    def on_evaluation(self, row: Row, images: np.ndarray) -> str | None:
        """A round was sampled, and scored in row["scores"]; images: the first samples, uint8 [at most 64, c, h, w]."""

    def on_round(self, row: Row) -> str | None:
        """A round is complete. `row` is what rounds.jsonl will say of it."""

    def on_end(self, result: Row) -> None:
        """The run is complete, or was stopped (then "stopped" says why); result.json and the model are written."""


@dataclass
class EarlyStopping(Callback):
    """Stops a run once a score has not become better for some evaluations (Prechelt 1998)."""

    score: str
    """A score's name, such as fd[digits]; "held_out.global", the loss on held-out examples; or "loss"."""
    patience: int = 3
    """After so many evaluations without a better value the run ends."""
    least: float = 0.0
    """How much better a value must be, to count."""
    higher_is_better: bool | None = None
    """None: as fedray knows of the score; of a user's own metric, lower is."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"EarlyStopping: patience is {self.patience}; it must be above 0.")
        self._best: tuple[float, float, int]
        self._since = 0
        self._forget()

    def on_start(self, rows: Sequence[Row]) -> None:
        self._forget()
        for row in rows:
            self.on_round(row)

    def on_round(self, row: Row) -> str | None:
        value = self._value(row)
        if value is None:
            return None
        higher = higher_is_better(self.score) if self.higher_is_better is None else self.higher_is_better
        badness = -value if higher else value
        if badness < self._best[0] - self.least:  # never true of nan
            self._best, self._since = (badness, value, row["round"]), 0
        else:
            self._since += 1
        if self._since < self.patience:
            return None
        _, best, at = self._best
        return f"{self.score} has not been better than {best:.4g} (round {at}) for {self._since} evaluations"

    def _forget(self) -> None:
        self._best, self._since = (math.inf, math.nan, 0), 0  # less is better; the value; its round

    def _value(self, row: Row) -> float | None:
        if self.score == "loss":
            return row["loss"]
        if self.score.startswith("held_out."):
            return row["held_out"].get(self.score.removeprefix("held_out."))
        if row["scores"]:
            check_name("score", self.score, row["scores"])
            return row["scores"][self.score]["value"]
        return None


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, called together.

    Raises:
        RunError: one failed; the run can be resumed.
    """

    callbacks: Sequence[Callback]

    def start(self, rows: Sequence[Row]) -> None:
        for each in self.callbacks:
            _call(each.on_start, rows)

    def evaluation(self, row: Row, images: np.ndarray) -> str | None:
        """Tell of an evaluation; return why the run is to end, if it is."""
        return _first([_call(each.on_evaluation, row, images) for each in self.callbacks])

    def round(self, row: Row) -> str | None:
        """Tell of a round and its clients; return why the run is to end, if it is."""
        clients = [_call(each.on_client, client) for client in row["clients"] for each in self.callbacks]
        return _first([*clients, *(_call(each.on_round, row) for each in self.callbacks)])

    def end(self, result: Row) -> None:
        for each in self.callbacks:
            _call(each.on_end, result)


def _call(method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*copy.deepcopy(arguments))
    except UserError:
        raise
    except Exception as error:  # the user's code
        failed = RunError(f"the callback {method.__qualname__} failed: {type(error).__name__}: {reason(error)}.")
        failed.add_note(traceback.format_exc())
        raise failed from error


def _first(reasons: Sequence[Any]) -> str | None:
    return next((str(why) for why in reasons if why), None)
