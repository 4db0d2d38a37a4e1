"""Terminal output of commands: tables, the next command to type."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

from fedray.commands.console import show
from fedray.reports.progress import progress as progress
from fedray.scores.metrics import deciding, metric_of

if TYPE_CHECKING:
    import pandas as pd

    from fedray.federation.evaluation import Evaluation


def program() -> str:
    """Return the command that starts fedray here: its path, where its environment is not activated."""
    return "fedray" if shutil.which("fedray") else os.path.relpath(Path(sys.executable).with_name("fedray"))


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
