"""Trackers show a run elsewhere. Its directory is the record: what they show can be made of it at any time.

A tracker is told of a run (`Tracked`), and then of its rounds, each once and in order. It says how far it has come, so
that a run that was killed and resumed goes on in the same place, without a round doubled or left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from fedray import own
from fedray.config import Config
from fedray.errors import UserError, check_name, reason
from fedray.record.run import Row, Run

OURS = {"tensorboard": "TensorBoard", "wandb": "Wandb", "trackio": "Trackio", "mlflow": "MLflow"}  # classes by file
DEFAULT = ("tensorboard",)
VERBS = ("start", "log", "finish")  # of a tracker
PROJECT = "fedray"  # where a tracker has projects, and the environment names none
PICTURES = ("samples", "validation", "nearest")  # folders of a run
GROUPS = ("seconds", "held_out", "aggregation", "ledger", "privacy")  # of numbers, in a row
OF_CLIENTS = ("loss", "held_out_local", "seconds", "bytes_up")
CLIENTS = 64  # of larger cohorts, clients have no curves of their own


@dataclass(frozen=True)
class Tracked:
    """A run, as trackers are told of it before its rounds. `id` and `name` stay the same when it is resumed."""

    id: str
    name: str
    """Its directory's name."""
    group: str | None
    """Of a sweep's trial, or a client alone: what it belongs to."""
    settings: dict[str, Any]
    """Settings by name, the task's as task.NAME, and versions.NAME: numbers, text and None."""
    directory: Path
    started: float
    """When its first process began it: seconds since 1970."""


@dataclass(frozen=True)
class Entry:
    """A round, as trackers show it. Round 0 is the beginning: the partition, and samples of the base, where drawn."""

    round: int
    time: float
    """Seconds since 1970."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Numbers by name: "round", "loss", "seconds/…", "held_out/…", scores, "client/003/loss" …"""
    pictures: dict[str, Path] = field(default_factory=dict)
    """PNG files by name: "partition", "samples", "validation", "nearest"."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """After the last round, its scores, a row for each: score, value, n, std, and over (what std is taken over)."""
    row: Row = field(default_factory=dict)
    """The line of rounds.jsonl; of the beginning, nothing."""


class Tracker(Protocol):
    """Somewhere that runs are shown. What it raises is warned of, and ends no run."""

    def start(self, run: Tracked) -> int | None:
        """Begin to show a run, or go on. Return the last round that is shown already; None if nothing is."""

    def log(self, entry: Entry) -> None:
        """Show one more round. The process may be killed at any time after."""

    def finish(self) -> None:
        """End: all that was logged is to be seen. The run may be resumed later."""


class Trackers:
    """The trackers of a run. What fails there is warned of, and made good from the run when the next round comes."""

    def __init__(self, run: Run, config: Config, trackers: Sequence[Tracker], group: str | None = None) -> None:
        self.run = run
        self.rounds = config.rounds
        self.trackers = trackers
        self.about = tracked(run, config, group)
        self.following = set[int]()  # the trackers, by number, that show all that came before
        self.warned = set[int]()
        self.add()

    def add(self, *rows: Row) -> None:
        """Show rows that are durable: the last of rounds.jsonl."""
        for number, tracker in enumerate(self.trackers):
            with self._forgiven(number):
                if number in self.following:
                    entries = [self._entry(row) for row in rows]
                else:
                    last = tracker.start(self.about)
                    entries = [self._beginning(), *map(self._entry, self.run.rows)]
                    entries = [entry for entry in entries if last is None or entry.round > last]
                self.following.discard(number)  # until it shows them all
                for entry in entries:
                    tracker.log(entry)
                self.following.add(number)

    def close(self) -> None:
        """End all trackers, however the run ends."""
        for number in sorted(self.following):
            with self._forgiven(number):
                self.trackers[number].finish()

    @contextmanager
    def _forgiven(self, number: int) -> Iterator[None]:
        """Warn once of what a tracker raises."""
        try:
            yield
        except Exception as error:
            if number not in self.warned:
                name = type(self.trackers[number]).__name__
                warnings.warn(f"{name} shows no new rounds for now: {reason(error)}.", stacklevel=4)
                self.warned.add(number)

    def _beginning(self) -> Entry:
        partition = self.run.directory / "partition.png"
        drawn = {"partition": partition} if partition.is_file() and not partition.is_symlink() else {}
        return Entry(0, self.about.started, {"round": 0}, drawn | self._pictures(0))

    def _entry(self, row: Row) -> Entry:
        over = row["round"] == self.rounds or "stopped" in row
        pictures, table = self._pictures(row["round"]), scores_of(row) if over else []
        return Entry(row["round"], row.get("time", 0.0), scalars_of(row), pictures, table, row)

    def _pictures(self, number: int) -> dict[str, Path]:
        paths = {name: self.run.directory / name / f"round-{number:06d}.png" for name in PICTURES}
        # Not through a link: what it leads to is not the run's to show.
        return {name: path for name, path in paths.items() if path.is_file() and not path.is_symlink()}


def tracked(run: Run, config: Config, group: str | None = None) -> Tracked:
    """Describe a run to its trackers."""
    settings = config.to_json()
    flat = settings | {f"task.{name}": value for name, value in settings.pop("task").items()}
    flat |= {f"versions.{name}": version for name, version in run.saved.get("versions", {}).items()}
    simple = (int, float, str, type(None))
    plain = {key: value if isinstance(value, simple) else str(value) for key, value in flat.items()}
    began = run.saved.get("started")
    started = 0.0 if began is None else datetime.strptime(began, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return Tracked(run.saved.get("id", run.directory.name), run.directory.name, group, plain, run.directory, started)


def scalars_of(row: Row) -> dict[str, float]:
    """Take the numbers of a round, by name."""
    few = len(row.get("clients", ())) <= CLIENTS
    numbers = {
        **{name: row.get(name) for name in ("round", "loss", "steps", "images", "bytes_down", "bytes_up")},
        "bytes": row["bytes_down"] + row["bytes_up"],
        "seconds": row["seconds"]["round"],
        **{f"{group}/{name}": value for group in GROUPS for name, value in row.get(group, {}).items()},
        **{name: score["value"] for name, score in row["scores"].items()},
        **{
            f"client/{client['client']:03d}/{name}": client.get(name)
            for client in row.get("clients", ())
            for name in OF_CLIENTS
            if few
        },
    }
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def scores_of(row: Row) -> list[dict[str, Any]]:
    """List the scores of a round: name, value, n, std and over."""
    return [
        {"score": name, **{key: score.get(key) for key in ("value", "n", "std", "over")}}
        for name, score in row["scores"].items()
    ]


def open_trackers(names: Sequence[str | Tracker]) -> list[Tracker]:
    """Make the trackers that are named; "none" is none. Raises `UserError` as `open_tracker`."""
    return [open_tracker(each) if isinstance(each, str) else each for each in names if each != "none"]


def open_tracker(name: str) -> Tracker:
    """Make a tracker by its name, or of a class of the user's, as FILE.py:CLASS.

    Raises:
        UserError: there is none of that name, its library is not installed, or the file has no such class.
    """
    if ".py:" in name:
        file, _, cls = name.rpartition(":")
        found = getattr(own.load_file(file), cls, None)
        if not (isinstance(found, type) and all(callable(getattr(found, each, None)) for each in VERBS)):
            raise UserError(f"{file} has no tracker {cls!r}: a class with {', '.join(VERBS[:-1])} and {VERBS[-1]}.")
        return found()
    check_name("tracker", name, OURS)
    if name != "tensorboard" and importlib.util.find_spec(name) is None:
        raise UserError(f"--report-to {name}: the package {name} is not installed; pip install 'fedray[{name}]'.")
    return getattr(importlib.import_module(f"fedray.record.trackers.{name}"), OURS[name])()
