"""Terminal output of commands: progress, tables, the next command to type."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from fedray.commands.console import show
from fedray.scores.metrics import deciding, metric_of

if TYPE_CHECKING:
    import pandas as pd

    from fedray.federation.evaluation import Evaluation
    from fedray.record.run import Row


def program() -> str:
    """Return the command that starts fedray here: its path, where its environment is not activated."""
    return "fedray" if shutil.which("fedray") else os.path.relpath(Path(sys.executable).with_name("fedray"))


@contextmanager
def progress(
    rounds: int, alone: bool = False
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str, float, float], None]]]:
    """Show a progress bar with the time left, and a line per round; yield the `on_row` and `show` that `run` takes.

    Args:
        alone: rounds are of several runs, one per client.
    """

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
                f"{(row['bytes_down'] + row['bytes_up']) / 1e6:.1f} MB{_spent(row.get('privacy', {}))}"
                f"{dropped}",
                *again,
                *cost,
                *(f"\n  client {client['client']} left out: {client['outcome']}" for client in failed),
                *(f"\n  {name} {score['value']:.4g} (n = {score['n']})" for name, score in row["scores"].items()),
                highlight=False,
                markup=False,
            )

        yield on_row, show


def print_table(runs: dict[str, Path], mean: bool = False) -> None:
    """Print complete runs side by side; with `mean`, a row per run and their mean."""

    from fedray.reports.results import summary

    frame = summary(runs)
    if mean:  # what fits: the losses and the score that decides
        score = deciding(map(str, frame))
        frame = frame[[name for name in frame if "loss" in str(name) or name == score]]
        frame.loc["mean"] = frame.mean()
    else:
        frame = frame.T
    table = Table(Column("", no_wrap=True), *map(escape, frame.columns))
    for name, values in frame.iterrows():
        table.add_row(escape(str(name)), *map(_number, values))
    show(table)


def print_frame(frame: pd.DataFrame) -> None:
    """Print a table of text, with its index."""
    table = Table(escape(str(frame.index.name)), *(escape(str(name)) for name in frame.columns))
    for name, values in frame.iterrows():
        table.add_row(escape(str(name)), *map(escape, values))
    show(table)


def _spent(privacy: dict[str, float | None]) -> str:
    if not privacy:
        return ""
    return (
        "  no ε: no noise" if privacy["epsilon"] is None else f"  ε {privacy['epsilon']:.3g} (δ {privacy['delta']:g})"
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def print_scores(title: str, evaluation: Evaluation) -> None:

    table = Table("score", "value", "std", "n", "remarks", title=title, title_justify="left")
    for name, score in evaluation.scores.items():
        deviation = "" if score.std is None else f"± {score.std:.2g}"
        metric = metric_of(name)
        remarks = [metric.remark if metric else None, f"std over {score.over}" if score.over else None, score.note]
        table.add_row(escape(name), f"{score.value:.4g}", deviation, f"{score.n:,}", "; ".join(filter(None, remarks)))
    for name, reason in evaluation.about["refused"].items():
        table.add_row(escape(name), "–", "", "", f"refused: {reason}")
    show(table)
