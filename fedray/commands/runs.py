"""fedray runs: which runs go on, are complete, or stopped."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedray.errors import UserError
from fedray.record.copies import local
from fedray.record.following import goes_on
from fedray.record.run import Run
from fedray.scores.metrics import deciding
from fedray.storage import shown


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List runs: which go on, which are complete, and which stopped and can be resumed."""

    places: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Directories of runs, of sweeps, or folders that hold such; or their URLs."""
    address: str | None = None
    """A Ray cluster (auto, or HOST:PORT): list also the runs that go on there, wherever their directories are."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray runs`."""
    options = tyro.cli(Runs, args=arguments, prog="fedray runs")
    places = [local(place) for place in options.places]
    for place in places:
        if not place.is_dir() and not (options.address and place == Path("runs")):
            raise UserError(f"there are no runs at {shown(place)}: it is no directory.")
    table = Table(Column("run", overflow="fold"), "state", "round", "loss", "score", "last round")
    listed = set()
    for directory in _below(places):
        listed.add(shown(directory.absolute()))
        table.add_row(escape(shown(directory)), *map(escape, _told(directory)))
    if options.address:
        from fedray.cluster.driver import drivers  # Ray takes seconds to import

        for out, phase, rounds in drivers(options.address):
            if out not in listed:
                table.add_row(escape(out), f"goes on: {escape(phase)}", str(rounds), "", "", "")
    Console().print(table)


def _below(places: list[Path]) -> Iterator[Path]:
    """Find the run directories at and below the places."""
    for place in places:
        for path, directories, names in os.walk(place):
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            if "config.json" in names:
                directories.clear()  # below a run there are no runs
                yield Path(path)


def _told(directory: Path) -> list[str]:
    """Return the state of a run, its round of how many, loss, deciding score, and when its last round ended."""
    run = Run(directory)
    try:
        state = "goes on" if goes_on(run) else "stopped" if run.result is None else "complete"
        state = "ended early" if state == "complete" and "stopped" in (run.result or {}) else state
        rows, rounds = run.rows, run.saved["config"]["rounds"]
    except UserError as error:
        return [f"damaged: {error}", "", "", "", ""]
    if not rows:
        return [state, f"0/{rounds}", "", "", ""]
    scores = (run.result or {}).get("scores", {})
    name = deciding(scores)
    score = f"{name} {scores[name]['value']:.4g}" if name else ""
    ago = time.time() - (directory / "rounds.jsonl").stat().st_mtime
    return [state, f"{len(rows)}/{rounds}", f"{rows[-1]['loss']:.4f}", score, f"{_words(ago)} ago"]


def _words(seconds: float) -> str:
    """Write a duration in words."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
