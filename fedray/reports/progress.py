"""Progress of a run, on a terminal or in a notebook."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedray.scores.metrics import deciding

Row = dict[str, Any]
OnRow = Callable[[Row], None]
Show = Callable[[str, float, float], None]
LINES = 5  # rounds that a notebook shows
EVERY = 0.2  # seconds between changes of it


@contextmanager
def followed(
    rounds: int, on_row: OnRow | None, show: Show | None, directory: Path | None = None
) -> Iterator[tuple[OnRow, Show]]:
    """Yield what is given; where nothing is, and somebody looks on, a progress bar.

    Args:
        directory: the run's, whose samples a notebook shows.
    """
    console = Console()
    if on_row is None and show is None and (console.is_terminal or console.is_jupyter):
        with progress(rounds, directory=directory) as made:
            yield made
    else:
        yield on_row or (lambda row: None), show or (lambda phase, done, total: None)


@contextmanager
def progress(rounds: int, alone: bool = False, directory: Path | None = None) -> Iterator[tuple[OnRow, Show]]:
    """Show a progress bar with the time left, and a line per round; yield the `on_row` and `show` that `run` takes.

    In a notebook it is an element of the page, which a saved notebook keeps.

    Args:
        alone: rounds are of several runs, one per client.
    """
    if Console().is_jupyter:
        page = Page(rounds, directory)
        try:
            yield page.on_row, page.show
        finally:
            page.end()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        current = bar.add_task("starting", total=None)
        phase = "starting"

        def show(now: str, done: float, total: float) -> None:
            nonlocal current, phase
            if now != phase:
                bar.remove_task(current)
                current, phase = bar.add_task(now, total=total), now
            bar.update(current, completed=done)

        def on_row(row: Row) -> None:
            if "gone_back" in row:
                bar.console.print(row["gone_back"], highlight=False, markup=False)
            failed = [client for client in row["clients"] if client["outcome"] != "ok"]
            who = f"client {row['cohort'][0]}  " if alone else ""
            ledger = row["ledger"]
            cost = [
                f"\n  {ledger['retried']} of {ledger['asked']} clients done again, {ledger['actors_lost']} processes "
                f"lost; {ledger['seconds_lost']:.1f} s in vain"
            ] * (ledger["seconds_lost"] > 0)
            again = [
                f"\n  client{'s' if len(lost['clients']) > 1 else ''} {', '.join(map(str, lost['clients'][:5]))}"
                f"{' …' if len(lost['clients']) > 5 else ''} lost: {lost['reason']}"
                if lost["clients"]
                else f"\n  {lost['reason']}"
                for lost in row.get("lost", ())
            ]
            dropped = f"  {ledger['dropped']} dropped out" if ledger.get("dropped") else ""
            loss = "no client" if row["loss"] is None else f"loss {row['loss']:.4f}"
            bar.console.print(
                f"{who}round {row['round']}/{rounds}  {loss}  {row['seconds']['round']:.1f} s  "
                f"{(row['bytes_down'] + row['bytes_up']) / 1e6:.1f} MB{_spent(row)}"
                f"{dropped}",
                *again,
                *cost,
                *(f"\n  client {client['client']} left out: {client['outcome']}" for client in failed),
                *(f"\n  {name} {score['value']:.4g} (n = {score['n']})" for name, score in row["scores"].items()),
                highlight=False,
                markup=False,
            )

        yield on_row, show


class Live:
    """An element of a notebook's page that changes in place. A saved notebook keeps what it was last."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._next_change = 0.0
        self._place = display(HTML(self.html()), display_id=True)

    def html(self) -> str:
        """Return what it shows."""
        raise NotImplementedError

    def change(self, now: bool = False) -> None:
        """Show what there is by now, unless that was done a moment ago."""
        from IPython.display import HTML

        if now or time.monotonic() >= self._next_change:
            self._next_change = time.monotonic() + EVERY
            self._place.update(HTML(self.html()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; its rows are HTML already."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{names}</tr>{lines}</table>"


class Page(Live):
    """Progress as HTML in a notebook: the phase, the last rounds, and the samples of the last evaluation."""

    def __init__(self, rounds: int, directory: Path | None = None) -> None:
        self.rounds = rounds
        self.directory = directory
        self.rows: list[Row] = []
        self.phase = ("starting", 0.0, 1.0)
        self.began = time.monotonic()
        super().__init__()
        self._picture: Any = None

    def on_row(self, row: Row) -> None:
        self.rows = [*self.rows, row][-LINES:]
        self.change(now=True)
        self._draw(row["round"])

    def show(self, phase: str, done: float, total: float) -> None:
        self.phase = (phase, done, total)
        self.change()

    def end(self) -> None:
        """Leave the last rounds, without the bar."""
        done = self.rows[-1]["round"] if self.rows else 0
        self.phase = (f"{done} of {self.rounds} rounds, {time.monotonic() - self.began:.1f} s", 0, 0)
        self.change(now=True)

    def _draw(self, number: int) -> None:
        """Show the samples of a round, where there are any, in place of those before."""
        from IPython.display import Image, display

        path = self.directory and self.directory / f"samples/round-{number:06d}.png"
        if path is None or not path.is_file():
            return
        picture = Image(data=path.read_bytes(), format="png", alt=f"samples after round {number}")
        if self._picture is None:
            self._picture = display(picture, display_id=True)
        else:
            self._picture.update(picture)

    def html(self) -> str:
        phase, done, total = self.phase
        bar = f'<progress value="{done:g}" max="{total:g}"></progress> ' if total else ""
        lines = [[html.escape(cell) for cell in _cells(row)] for row in self.rows]
        head = ["round", "loss", "score", "seconds"]
        return f"<div>{bar}{html.escape(phase)}</div>{table(head, lines) if lines else ''}"


def _cells(row: Row) -> tuple[str, str, str, str]:
    score = deciding(row["scores"])
    loss = "no client" if row["loss"] is None else f"{row['loss']:.4f}"
    value = f"{score} {row['scores'][score]['value']:.4g} (n = {row['scores'][score]['n']})" if score else ""
    return str(row["round"]), loss, value, f"{row['seconds']['round']:.1f}"


def _spent(row: Row) -> str:
    said = ""
    for kind, of in {"privacy": "", "example_privacy": " of examples"}.items():
        if spent := row.get(kind):
            found = spent["epsilon"]
            said += f"  no ε{of}: no noise" if found is None else f"  ε{of} {found:.3g} (δ {spent['delta']:g})"
    return said
