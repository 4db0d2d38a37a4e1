"""Charts of a report, as data for Observable Plot: curves over rounds, and the last score against what varies."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from fedray.reports.answer import LOSSES, decisive, field_of, number, real_of, title_of, value_of
from fedray.reports.results import finals

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")  # Okabe and Ito 2008
DASHES = ("", "6 4", "2 3", "8 3 2 3")
POINTS = 2000  # of a chart, about: some 100 kB
COSTS = {
    "total.sequential_steps": "sequential steps",
    "total.images": "images seen",
    "total.bytes": "bytes sent, both ways",
    "total.training_seconds": "seconds of training",
}

Chart = dict[str, Any]


def settings_of(rounds: pd.DataFrame) -> list[dict[str, str]]:
    """List the settings of a chapter, in their order, each with its colour and dashes in all charts."""
    return [{"name": str(name)} | style(index) for index, name in enumerate(rounds["setting"].unique())]


def style(index: int) -> dict[str, str]:
    """Choose a colour and dashes."""
    return {"colour": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]}


def charts(rounds: pd.DataFrame, free: list[str]) -> Iterable[Chart]:
    """Draw the charts of a report, with what they can be drawn against.

    Args:
        rounds: of `with_settings`.
        free: the columns that vary.
    """
    done = finals(rounds)
    settings = [(index, rows) for index, (_, rows) in enumerate(rounds.groupby("setting", sort=False))]
    score = decisive(rounds if done.empty else done)
    real = real_of(rounds, score)

    def lines(column: str, name: str = "") -> list[dict[str, Any]]:
        found = [(of, rows) for of, rows in settings if column in rows and rows[column].notna().any()]
        return [_curve(rows, of, column, name, POINTS // max(1, len(found))) for of, rows in found]

    if done["setting"].nunique() > 1:
        yield _against(rounds, free, done.dropna(subset=[score]), score, real)
    if score not in LOSSES and rounds.dropna(subset=[score]).groupby("directory").size().max() > 1:
        yield _curves(f"{score} over rounds", title_of(score), lines(score), real)
    yield _curves("Training loss over rounds", "loss ↓", lines("loss"))
    if held_out := lines("held_out.global"):
        if len(settings) == 1:
            kinds = {"global": "aggregated, all clients", "aggregated": "aggregated", "local": "before aggregation"}
            held_out = [
                line | style(index)
                for index, (kind, name) in enumerate(kinds.items())
                for line in lines(f"held_out.{kind}", name)
            ]
        yield _curves("Loss on held-out images", "loss ↓", held_out)
    if lost := lines("aggregation.error_mean"):
        yield _curves("What aggregation loses of the adapters' mean change", "relative error ↓", lost)


def _curve(rows: pd.DataFrame, of: int, column: str, name: str, most: int) -> dict[str, Any]:
    """Make a setting's line over rounds: the mean over seeds, in a band from the lowest to the highest."""
    by_round = rows.dropna(subset=[column]).groupby("round")
    points = by_round[column].agg(["mean", "min", "max", "count"]).astype(float)
    points = points.join(by_round[list(COSTS)].mean())
    points = points.iloc[thinned(len(points), most)]
    across = {"round": points.index.tolist()} | {cost: values(points[cost]) for cost in COSTS}
    band = bool(points["count"].max() > 1)
    line = _line(points, of, across, column) | {"name": name or rows["setting"].iloc[0], "band": band}
    return line | style(of)


def thinned(length: int, most: int) -> np.ndarray:
    """Choose at most so many indices, evenly, the last always."""
    return np.unique(length - 1 - np.linspace(0, length - 1, min(length, most)).round().astype(int))


def _curves(title: str, measured: str, lines: list[dict[str, Any]], real: float | None = None) -> Chart:
    numbers = sorted({number for line in lines for number in line["x"]["round"]})
    ticks = numbers if len(numbers) <= 10 else None  # none between rounds
    axes = [{"key": "round", "title": "round", "type": "linear", "ticks": ticks}]
    return _chart(title, measured, lines, axes, real)


def _against(rounds: pd.DataFrame, free: list[str], done: pd.DataFrame, score: str, real: float | None) -> Chart:
    """Draw the last round's score against what varies."""
    index_of = {name: index for index, name in enumerate(rounds["setting"].unique())}
    numbers = [name for name in free if done[name].dtype in ("Int64", "float64") and done[name].nunique() > 1]
    along = numbers[0] if numbers else "setting"
    follows = not numbers or done["setting"].nunique() == done[along].nunique()
    others = [] if follows else [name for name in free if name != along]
    if others and done["setting"].nunique() < 2 * done.groupby(others, dropna=False).ngroups:  # no lines to draw
        numbers, along, others = [], "setting", []
    groups = done.groupby(others, sort=False, dropna=False) if others else [((), done)]
    lines = []
    for index, (_, rows) in enumerate(groups):
        by_setting = rows.dropna(subset=[along]).groupby("setting", sort=False)
        points = by_setting[score].agg(["mean", "std", "min", "max", "count"]).astype(float)
        across = {along: by_setting[along].first().tolist()}
        across |= {cost: values(by_setting[cost].mean()) for cost in COSTS}
        given = [other for other in others if rows[other].notna().all()]
        name = ", ".join(f"{field_of(other)}={value_of(rows[other].iloc[0])}" for other in given)
        line = _line(points, [index_of[setting] for setting in points.index], across, score) | {"name": name}
        line["where"] = points.index.tolist()
        joined = {"joined": bool(numbers), "each": not numbers}  # else a point has its setting's colour
        lines.append(line | style(index) | joined)
    places = sorted(done[along].dropna().unique().tolist())
    wide = bool(numbers) and places[0] > 0 and places[-1] >= 8 * places[0]
    kind = "point" if not numbers else "log" if wide else "linear"
    ticks = places if numbers else [] if max(map(len, places)) * len(places) > 100 else None
    axis = {"key": along, "title": field_of(along), "type": kind, "ticks": ticks}
    return _chart(f"{LOSSES.get(score, score)} after the last round", title_of(score), lines, [axis], real)


def _line(points: pd.DataFrame, of: int | list[int], across: dict[str, list[Any]], measured: str) -> dict[str, Any]:
    """Make a line that can be drawn against each of `across`, at first the first.

    Args:
        of: the setting, by its index; of each point, where they are of several.
    """
    made: dict[str, Any] = {"x": across, "y": values(points["mean"]), "of": of, "joined": True, "each": False}
    made["measured"] = LOSSES.get(measured, measured)
    if points["count"].max() > 1:
        made |= {"low": values(points["min"]), "high": values(points["max"])}
        made["count"] = points["count"].astype(int).tolist()
    return made | ({"std": values(points["std"].fillna(0))} if "std" in points else {})


def _chart(
    title: str, measured: str, lines: list[dict[str, Any]], axes: list[dict[str, Any]], real: float | None
) -> Chart:
    """Make a chart of lines, with what it can be drawn against."""
    shown = [value for line in lines for value in line["y"] if value is not None]
    wide = bool(shown) and min(shown) > 0 and max(shown) > 10 * min(shown)
    near = real is not None and real > min(shown, default=0) / 5
    axes += [{"key": cost, "title": name, "type": "linear", "ticks": None} for cost, name in COSTS.items()]
    notes = ["Bars: ± one standard deviation over seeds."] if any(any(line.get("std", ())) for line in lines) else []
    notes += ["Bands: from the lowest to the highest seed."] if any(line.get("band") for line in lines) else []
    notes += [] if real is None else [f"{'Dotted: r' if near else 'R'}eal images against real ones: {number(real)}."]
    figure = {"kind": "lines", "measured": measured, "log": wide, "lines": lines, "real": real if near else None}
    return {"title": title, "note": " ".join(notes), "axes": axes, "figure": figure}


def values(series: pd.Series) -> list[float | None]:
    """List numbers with as many digits as can be seen."""
    return [None if pd.isna(value) else float(f"{value:.5g}") for value in series.tolist()]
