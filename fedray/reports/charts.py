"""Charts of a report, for plotly.js: curves over rounds, and the last round's score against what varies."""

import html
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedray.reports.answer import LOSSES, decisive, field_of, number, real_of, title_of, value_of
from fedray.reports.results import finals

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")  # Okabe and Ito 2008
POINTS = 200  # of a line, at most
DASHES = ("solid", "dash", "dot", "dashdot")
COSTS = {
    "total.sequential_steps": "sequential steps",
    "total.images": "images seen",
    "total.bytes": "bytes sent, both ways",
    "total.training_seconds": "seconds of training",
}


def charts(rounds: pd.DataFrame, free: list[str]) -> Iterable[dict[str, Any]]:
    """Draw the charts of a report, as plotly's JSON, with what they can be drawn against.

    Args:
        rounds: of `with_settings`.
        free: the columns that vary.
    """
    done = finals(rounds)
    settings = [(str(name), rows) for name, rows in rounds.groupby("setting", sort=False)]
    score = decisive(rounds if done.empty else done)
    real = real_of(rounds, score)

    def lines(column: str) -> list[tuple[str, pd.DataFrame, str]]:
        return [(name, rows, column) for name, rows in settings if column in rows and rows[column].notna().any()]

    if done["setting"].nunique() > 1:
        yield _against(free, done.dropna(subset=[score]), score, real)
    if score not in LOSSES and rounds.dropna(subset=[score]).groupby("directory").size().max() > 1:
        yield _curves(f"{score} over rounds", title_of(score), lines(score), real)
    yield _curves("Training loss over rounds", "loss ↓", lines("loss"))
    if held_out := lines("held_out.global"):
        if len(settings) == 1:
            kinds = {"global": "aggregated, all clients", "aggregated": "aggregated", "local": "before aggregation"}
            held_out = [(kinds[kind], rounds, column) for kind in kinds for _, _, column in lines(f"held_out.{kind}")]
        yield _curves("Loss on held-out images", "loss ↓", held_out)
    if lost := lines("aggregation.error_mean"):
        yield _curves("What aggregation loses of the adapters' mean change", "relative error ↓", lost)


def _curves(title: str, measured: str, lines: list[tuple[str, pd.DataFrame, str]], real: float | None = None) -> Any:
    """Draw a line per setting over rounds: the mean over seeds, in a band from the lowest to the highest."""
    figure = go.Figure()
    for index, (name, rows, column) in enumerate(lines):
        by_round = rows.dropna(subset=[column]).groupby("round")
        points = by_round[column].agg(["mean", "min", "max", "count"]).astype(float)
        points = points.join(by_round[list(COSTS)].mean())
        points = points.iloc[np.unique(np.linspace(0, len(points) - 1, POINTS).round().astype(int))]
        points["where"] = [f"round {number}" for number in points.index]
        across = {"round": points.index.tolist()} | {cost: points[cost].tolist() for cost in COSTS}
        if points["count"].max() > 1:
            shade = f"rgba{(*bytes.fromhex(COLOURS[index % len(COLOURS)][1:]), 0.2)}"
            for bound, fill in (("min", None), ("max", "tonexty")):
                figure.add_scatter(
                    y=points[bound].tolist(), x=across["round"], meta=across, mode="lines", line_width=0, fill=fill,
                    fillcolor=shade, hoverinfo="skip", showlegend=False, legendgroup=index,
                )  # fmt: skip
        _line(figure, name, index, points, across, column)
    numbers = sorted({number for _, rows, _ in lines for number in rows["round"].tolist()})
    ticks = numbers if len(numbers) <= 10 else None  # none between rounds
    axes = [{"key": "round", "title": "round", "type": "linear", "ticks": ticks}]
    return _chart(figure, title, measured, axes, real)


def _against(free: list[str], done: pd.DataFrame, score: str, real: float | None) -> dict[str, Any]:
    """Draw the last round's score against what varies."""
    done = done.assign(setting=done["setting"].map(html.escape))
    numbers = [name for name in free if done[name].dtype in ("Int64", "float64") and done[name].nunique() > 1]
    along = numbers[0] if numbers else "setting"
    follows = not numbers or done["setting"].nunique() == done[along].nunique()
    others = [] if follows else [name for name in free if name != along]
    if others and done["setting"].nunique() < 2 * done.groupby(others, dropna=False).ngroups:  # no lines to draw
        numbers, along, others = [], "setting", []
    figure = go.Figure()
    groups = done.groupby(others, sort=False, dropna=False) if others else [((), done)]
    for index, (_, rows) in enumerate(groups):
        by_setting = rows.dropna(subset=[along]).groupby("setting", sort=False)
        points = by_setting[score].agg(["mean", "std", "min", "max", "count"]).astype(float)
        points["where"] = points.index
        across = {along: by_setting[along].first().tolist()}
        across |= {cost: by_setting[cost].mean().tolist() for cost in COSTS}
        given = [other for other in others if rows[other].notna().all()]
        name = ", ".join(f"{field_of(other)}={value_of(rows[other].iloc[0])}" for other in given)
        _line(figure, name, index, points, across, score)
    values = sorted(done[along].dropna().unique().tolist())
    wide = bool(numbers) and values[0] > 0 and values[-1] >= 8 * values[0]
    kind = "category" if not numbers else "log" if wide else "linear"
    ticks = values if numbers else [] if max(map(len, values)) * len(values) > 120 else None
    axis = {"key": along, "title": field_of(along), "type": kind, "ticks": ticks}
    return _chart(figure, f"{LOSSES.get(score, score)} after the last round", title_of(score), [axis], real)


def _line(
    figure: go.Figure, name: str, index: int, points: pd.DataFrame, across: dict[str, list[Any]], measured: str
) -> None:
    """Add a line that can be drawn against each of `across`, at first the first, with a text for each point."""
    hover = []
    for point in points.to_dict("records"):
        several = f"<br>{number(point['min'])} to {number(point['max'])} over {point['count']:.0f} seeds"
        value = f"{html.escape(LOSSES.get(measured, measured))} {number(point['mean'], 4)}"
        lines = [html.escape(name), point["where"], value + (several if point["count"] > 1 else "")]
        hover.append("<br>".join(dict.fromkeys(line for line in lines if line)))
    places = next(iter(across.values()))
    joined = len(places) < 2 or not isinstance(places[0], str)
    figure.add_scatter(
        x=places, y=points["mean"].tolist(), meta=across, name=html.escape(name), legendgroup=index,
        mode=("lines" if len(places) > 50 else "lines+markers") if joined else "markers",
        line={"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]},
        marker={"size": 7}, text=hover, hovertemplate="%{text}<extra></extra>",
        error_y={"array": points["std"].fillna(0).tolist()} if "std" in points else None,
    )  # fmt: skip


def _chart(figure: go.Figure, title: str, measured: str, axes: list[dict[str, Any]], real: float | None) -> Any:
    """Write a figure as JSON for plotly.js (which reads texts as markup), with what it can be drawn against."""
    shown = [value for line in figure.data for value in line.y if pd.notna(value)]
    wide = bool(shown) and min(shown) > 0 and max(shown) > 10 * min(shown)
    near = real is not None and real > min(shown, default=0) / 5
    if near:
        figure.add_hline(real, line={"dash": "dot", "width": 2, "color": "#8c8c8c"})
    axes += [{"key": cost, "title": name, "type": "linear", "ticks": None} for cost, name in COSTS.items()]
    figure.update_layout(
        template="none",
        xaxis={"title": {"text": axes[0]["title"]}, "type": axes[0]["type"], "tickvals": axes[0]["ticks"]},
        yaxis={"title": {"text": html.escape(measured) + " (log)" * wide}, "type": "log" if wide else "linear"}
        | ({"dtick": "D2", "tickformat": "~g"} if wide and max(shown) < 1000 * min(shown) else {}),
        showlegend=sum(bool(line.name) for line in figure.data) > 1,
    )
    notes = ["Bars: ± one standard deviation over seeds."] if any(line.error_y.array for line in figure.data) else []
    notes += ["Bands: from the lowest to the highest seed."] if any(line.fill for line in figure.data) else []
    notes += [] if real is None else [f"{'Dotted: r' if near else 'R'}eal images against real ones: {number(real)}."]
    return {"title": title, "note": " ".join(notes), "figure": json.loads(figure.to_json(engine="json")), "axes": axes}
