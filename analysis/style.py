"""How the figures look: colours, labels with units, scales and legends."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
MARKERS = "osD^vPX"
GREY = "#666666"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.hashsalt": "fedray",  # the same figure is the same file
}
SYMBOLS = {"clients": "C", "local_epochs": "E", "rounds": "T"}
LABELS = {
    "clients": "clients C",
    "local_epochs": "local epochs E",
    "local_steps": "local steps per round",
    "rounds": "communication rounds T",
    "round": "communication round",
    "loss": "training loss",
    "held_out.global": "held-out loss",
    "training_seconds": "local training time of a round (s, slowest client)",
    "total.sequential_steps": "sequential optimizer steps (of the slowest client)",
    "total.images": "images trained on (all clients)",
    "total.bytes": "bytes sent (all clients, down and up)",
    "total.training_seconds": "local training time (of the slowest client)",
}
UNITS = {"total.bytes": "B", "total.training_seconds": "s"}


def label(name: str) -> str:
    """What an axis or a legend calls a column."""
    return LABELS.get(name, name.removeprefix("task.").replace("_", " "))


def score_label(rounds: pd.DataFrame, score: str) -> str:
    """A score's name, and of how many samples it is."""
    counts = rounds.loc[rounds[score].notna(), f"{score}.n"].unique()
    return f"{score}, {counts[0]:,} samples" if len(counts) == 1 else score


def text(value: Any) -> str:
    """A setting's value, short."""
    if value is None or pd.isna(value):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting(name: str, value: Any) -> str:
    return f"{SYMBOLS.get(name, label(name))} = {text(value)}"


def colours(values: Sequence[Any]) -> dict[str, Any]:
    """A colour for each value, by its `text`."""
    many = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(values)))
    return dict(zip(map(text, values), COLOURS if len(values) <= len(COLOURS) else many, strict=False))


def markers(values: Sequence[Any]) -> dict[str, str]:
    """A marker for each value, by its `text`."""
    return {text(value): MARKERS[index % len(MARKERS)] for index, value in enumerate(values)}


def scale(axes: Axes, values: pd.Series, name: str) -> Callable[[Any], float]:
    """Prepare the x axis for a setting's values: places for names, ticks at numbers. Returns what gives the place."""
    axes.set_xlabel(label(name))
    distinct = sorted(values.dropna().unique()) + [None] * bool(values.isna().any())
    if any(value is None or isinstance(value, (str, bool, np.bool_)) for value in distinct):
        places = {text(value): float(place) for place, value in enumerate(distinct)}
        axes.set_xticks(list(places.values()), list(places))
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        return lambda value: places[text(value)]
    if distinct[0] > 0 and distinct[-1] >= 4 * distinct[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks([float(value) for value in distinct], [text(value) for value in distinct])
    axes.xaxis.set_minor_locator(NullLocator())
    return float


def measured(axes: Axes, name: str, values: pd.Series, log: bool) -> None:
    """Prepare the x axis for measured numbers: their unit, and logarithmic where they are far apart."""
    axes.set_xlabel(label(name))
    if log and values.min() > 0 and values.max() >= 8 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    whole = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_formatter(EngFormatter(UNITS[name]) if name in UNITS else whole)


def steep(axes: Axes, values: pd.Series) -> None:
    """Make the y axis logarithmic where values are far apart."""
    if values.min() > 0 and values.max() > 8 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def floor(axes: Axes, rounds: pd.DataFrame, score: str) -> None:
    """A line at what real images score against real ones, where that was measured."""
    real = f"{score}/real"
    if real in rounds and rounds[real].notna().any():
        level = rounds[real].mean()
        axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            "real against real", (1, level), (0, 2), ("axes fraction", "data"), textcoords="offset points",
            ha="right", size=7, color=GREY,
        )  # fmt: skip


def legend(figure: Figure, name: str | None, lines: dict[str, Line2D], where: str) -> None:
    """A legend beside the axes, upper or lower, under the name of a column: lines by what they are called."""
    title = label(name) if name else None
    place: Any = f"outside right {where}"  # which matplotlib types as one of some literals
    figure.legend(list(lines.values()), list(lines), title=title, loc=place, alignment="left")


def note(figure: Figure, seeds: pd.Series, spread: str) -> None:
    """Say over how many seeds means are, and what bars or bands are."""
    fewest, most = seeds.min(), seeds.max()
    over = f"mean over {most if fewest == most else f'{fewest} to {most}'} seeds; {spread}: ± standard deviation"
    figure.suptitle("one seed" if most == 1 else over, x=0.01, ha="left", fontsize=8, color=GREY)
