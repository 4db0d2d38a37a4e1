"""Figures of runs and sweeps, as PNG and SVG.

    python analysis/figures.py RESULTS [--score 'fd[digits]'] [--out DIR]

RESULTS is a folder of runs, or of the results.parquet that `fedray.reports.results.write` made. Draws the figures that
make sense for what varies there, to RESULTS/figures; of several sweeps that share RESULTS, each in a folder of its own.
Each function here draws one figure from the frame of `fedray.load`, and can be used from a notebook.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
import style
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from fedray.errors import UserError, check_name
from fedray.record.run import RECORD
from fedray.reports.results import finals, load, scores_of, varied

COSTS = ("total.sequential_steps", "total.bytes", "total.training_seconds")
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
PICTURES = 6  # of a run, at most


@matplotlib.rc_context(style.STYLE)
def score_against(rounds: pd.DataFrame, score: str, x: str, by: str | None = None) -> Figure:
    """A score after the last round against a setting, or against a number of the run such as "total.bytes".

    Points are means over the seeds of complete runs, bars their standard deviation; a line for each value of `by`.

    Raises:
        UserError: no complete run has the score; or runs at one x and `by` differ in more than their seeds.
    """
    check_name("score", score, scores_of(rounds))
    last = finals(rounds)
    last = last[last[score].notna()]
    if last.empty:
        raise UserError(f"no complete run has {score}.")
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = _columns(rounds, by)
    _columns(rounds, x)
    table = _over_seeds(last, score, x, lines)
    if x in list(last)[: list(last).index("round")]:
        _refuse_mixed(last, [x, *lines])
        place, others = style.scale(axes, table["x"], x), []
    else:
        style.measured(axes, x, table["x"], log=True)
        place, others = float, [name for name in dimensions(last) if name != by]
    shape = others[0] if len(others) == 1 else by  # what markers tell
    colour, marker = style.colours(_values(table, by)), style.markers(_values(table, shape))
    for value, line in _parts(table, by):
        line = line.assign(at=[place(each) for each in line["x"]]).sort_values("at")
        axes.plot(line["at"], line["mean"], color=colour[style.text(value)])
        for kind, points in _parts(line, shape):
            axes.errorbar(
                points["at"], points["mean"], points["std"], linestyle="", capsize=3, elinewidth=1,
                color=colour[style.text(value)], marker=marker[style.text(kind)],
            )  # fmt: skip
    style.floor(axes, last, score)
    axes.set_ylabel(style.score_label(last, score))
    if by:
        shown = {name: marker[name] if shape == by else "" for name in colour}
        drawn = {name: Line2D([], [], color=colour[name], marker=shown[name]) for name in colour}
        style.legend(figure, by, drawn, "upper")
    if shape and shape != by:
        dots = {name: Line2D([], [], color="black", linestyle="", marker=kind) for name, kind in marker.items()}
        style.legend(figure, shape, dots, "lower")
    style.note(figure, table["n"], "bars")
    return figure


@matplotlib.rc_context(style.STYLE)
def curves(
    rounds: pd.DataFrame, y: str | Sequence[str], x: str = "round", by: str | None = None, panels: str | None = None
) -> Figure:
    """Numbers of each round, such as "loss", against the round or a total so far such as "total.sequential_steps".

    Lines are means over the seeds of the runs in `rounds`, bands ± one standard deviation; a colour for each value of
    `by`, a panel for each value of `panels`. Of several `y` the first is solid, the others are dashed and dotted.

    Raises:
        UserError: runs of one line differ in more than their seeds.
    """
    ys = [y] if isinstance(y, str) else list(y)
    once = rounds.drop_duplicates(["sha256", "round"])
    lines = _columns(rounds, by, panels)
    _refuse_mixed(once, lines)
    _columns(rounds, x, *ys)
    tables = [_over_seeds(once[once[name].notna()], name, x, [*lines, "round"]).assign(y=name) for name in ys]
    everything = pd.concat(tables)
    count = len(_values(everything, panels))
    columns, rows = min(count, 3), -(-count // 3)
    size = (5.4, 3.6) if count == 1 else (3 * columns + 0.8, 2.7 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    colour, dashes = style.colours(_values(everything, by)), dict(zip(ys, DASHES, strict=False))
    for axes, (panel, inside) in zip(grid, _parts(everything, panels), strict=False):
        for (value, part), name in [(part, name) for part in _parts(inside, by) for name in ys]:
            line = part[part["y"] == name].sort_values("x")
            drawn = {"color": colour[style.text(value)]}
            few = "o" if len(line) < 12 else ""
            axes.plot(line["x"], line["mean"], dashes[name], marker=few, **drawn)
            if line["std"].notna().any():
                low, high = line["mean"] - line["std"], line["mean"] + line["std"]
                axes.fill_between(line["x"], low, high, alpha=0.2, linewidth=0, **drawn)
        if panels:
            axes.set_title(style.setting(panels, panel))
        style.measured(axes, x, everything["x"], log=False)
        style.steep(axes, everything["mean"])
        axes.set_xlabel("")
    for axes in grid[count:]:
        axes.set_visible(False)
    figure.supxlabel(style.label(x), fontsize=9)
    own = style.score_label(once, ys[0]) if ys[0] in scores_of(once) else style.label(ys[0])
    figure.supylabel(own if len(ys) == 1 else "", fontsize=9)
    if by:
        style.legend(figure, by, {name: Line2D([], [], color=each) for name, each in colour.items()}, "upper")
    if len(ys) > 1:
        kinds = {style.label(name): Line2D([], [], color=style.GREY, linestyle=dashes[name]) for name in ys}
        style.legend(figure, None, kinds, "lower" if by else "upper")
    style.note(figure, everything["n"], "bands")
    return figure


@matplotlib.rc_context(style.STYLE)
def samples(rounds: pd.DataFrame) -> Figure:
    """Grids of samples as training goes on: a row for each setting (its first seed), a column per evaluated round.

    Where no run was evaluated before its last round, rows and columns are settings.

    Raises:
        UserError: none of the run directories has samples.
    """
    names = dimensions(rounds)
    runs = rounds.sort_values([*names, "seed"]).drop_duplicates(names or "directory").to_dict("records")
    found = [(run, sorted(Path(run["directory"]).glob("samples/round-*.png"))) for run in runs]
    if not any(paths for _, paths in found):
        raise UserError("none of these runs has pictures of samples in its directory.")
    wide = len(names) == 2 and max(len(paths) for _, paths in found) == 1
    table: dict[str, list[tuple[str, Path]]] = {}
    for run, paths in found:
        row = "\n".join(style.setting(name, run[name]) for name in (names[:1] if wide else names))
        for index in np.linspace(0, len(paths) - 1, min(PICTURES, len(paths))).round().astype(int):
            after = f"round {int(paths[index].stem.removeprefix('round-'))}"
            title = style.setting(names[1], run[names[1]]) if wide else after
            table.setdefault(row, []).append((title, paths[index]))
    columns = max(map(len, table.values()))
    figure = Figure(figsize=(2 * columns + 0.8, 2.25 * len(table)), layout="constrained")
    grid = figure.subplots(len(table), columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for row_axes, (row, pictures) in zip(grid, table.items(), strict=True):
        row_axes[0].text(-0.06, 0.5, row, transform=row_axes[0].transAxes, ha="right", va="center")
        for axes, (title, path) in zip(row_axes, pictures, strict=False):
            axes.imshow(np.asarray(Image.open(path)))
            axes.set_title(title)
    return figure


def dimensions(rounds: pd.DataFrame) -> list[str]:
    """Settings that vary on their own: not those that follow from others, as T from C at equal sequential steps."""
    found: list[str] = []
    runs = rounds.drop_duplicates("sha256")
    for name in sorted(varied(runs), key=lambda name: (name in ("rounds", "local_steps"), name not in style.SYMBOLS)):
        values = runs.groupby(found, dropna=False)[name] if found else runs.groupby(lambda _: 0)[name]
        if (values.nunique(dropna=False) > 1).any():
            found.append(name)
    return found


def sweeps(place: Path, rounds: pd.DataFrame) -> dict[str, tuple[str, pd.DataFrame]]:
    """Question and rounds of each sweep that has its record in a folder, by name; all rounds as "" if none has."""
    found = {}
    folder = place if place.is_dir() else place.parent
    for path in sorted(folder.glob(f"*{RECORD}")):
        try:
            record = json.loads(path.read_text())
            runs = rounds["run"].isin([Path(trial["directory"]).name for trial in record["trials"]])
            found[str(record["name"])] = (str(record.get("question", "")), rounds[runs])
        except (ValueError, KeyError, TypeError):  # `load` has named it
            continue
    return {name: each for name, each in found.items() if len(each[1])} or {"": ("", rounds)}


def save(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg."""
    paths = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    with matplotlib.rc_context(style.STYLE):
        for each in paths:
            figure.savefig(each, metadata={"Date": None} if each.suffix == ".svg" else None)
    return paths


def every_figure(rounds: pd.DataFrame, score: str | None) -> Iterator[tuple[str, Figure]]:
    """Names and figures that make sense for what varies: a set for each combination of what one figure cannot hold."""
    shown = rounds[rounds["complete"]] if rounds["complete"].any() else rounds
    names = dimensions(shown)
    for values, part in shown.groupby(names[2:], dropna=False) if names[2:] else [((), shown)]:
        ending = "".join(f"-{name}-{style.text(value)}" for name, value in zip(names[2:], values, strict=True))
        for name, figure in _of_two(part, score, names[:2]):
            yield re.sub(r"[^A-Za-z0-9._-]+", "-", name + ending), figure


def _of_two(rounds: pd.DataFrame, score: str | None, names: list[str]) -> Iterator[tuple[str, Figure]]:
    by, panels = [*names, None, None][:2]
    last = finals(rounds)
    if by and score and last[score].notna().any():
        for x, other in ((by, panels), (panels, by)):
            if x:
                yield f"score-against-{x}", score_against(rounds, score, x, other)
        for cost in COSTS:
            if last[cost].nunique() > 1:
                yield f"score-against-{cost.removeprefix('total.')}", score_against(rounds, score, cost, by)
    for title, name in {"loss": "loss", "held-out-loss": "held_out.global", "score": score or ""}.items():
        if name in rounds and rounds.groupby("directory")[name].count().max() > 1:
            yield f"{title}-over-rounds", curves(rounds, name, "round", by, panels)
            if by:
                yield f"{title}-over-steps", curves(rounds, name, "total.sequential_steps", by, panels)
            if by and title == "score":
                yield f"{title}-over-training_seconds", curves(rounds, name, "total.training_seconds", by, panels)
    if any(Path(directory).joinpath("samples").is_dir() for directory in rounds["directory"].unique()):
        yield "samples", samples(rounds)


def _columns(rounds: pd.DataFrame, *names: str | None) -> list[str]:
    """Those that are given. Raises `UserError` if a name is not a column."""
    given = [name for name in names if name]
    for name in given:
        check_name("column", name, map(str, rounds))
    return given


def _over_seeds(rows: pd.DataFrame, y: str, x: str, lines: list[str]) -> pd.DataFrame:
    """A row for each setting: the columns `lines`, x (of totals the mean), and y's mean, std and count over seeds."""
    settings = list(dict.fromkeys([*lines, *varied(rows)]))
    found = []
    for _, same in _parts(rows, settings):
        values = same[y].astype(float)
        at = same[x].astype(float).mean() if x.startswith("total.") else same[x].iloc[0]
        numbers = {"x": at, "mean": values.mean(), "std": values.std(), "n": len(values)}
        found.append({name: same[name].iloc[0] for name in settings} | numbers)
    return pd.DataFrame(found)


def _refuse_mixed(rounds: pd.DataFrame, fixed: list[str]) -> None:
    """Raise `UserError` if runs that agree in `fixed` differ in other settings: a mean over them would mix them."""
    for _, same in _parts(rounds, fixed):
        if differ := varied(same):
            raise UserError(f"the runs differ also in {', '.join(differ)}: choose those of one value of it first.")


def _parts(table: pd.DataFrame, by: str | list[str] | None) -> list[tuple[Any, pd.DataFrame]]:
    """The parts of a table that agree in a column, with its value."""
    return list(table.groupby(by, dropna=False)) if by else [(None, table)]


def _values(table: pd.DataFrame, by: str | None) -> list[Any]:
    return [value for value, _ in _parts(table, by)]


@dataclass(frozen=True)
class Question:
    results: tyro.conf.Positional[Path]
    """A folder of runs or sweeps, or of a results.parquet."""
    score: str | None = None
    """Which score to draw; by default the first that there is."""
    out: Path | None = None
    """Folder of the figures; by default RESULTS/figures."""


def main(asked: Question) -> None:
    rounds, problems = load(asked.results)
    for problem in problems:
        print(f"note      {problem}", file=sys.stderr)
    if rounds.empty:
        raise UserError(f"there is no complete round at {asked.results} to draw.")
    names = scores_of(rounds)
    if asked.score is not None:
        check_name("score", asked.score, names)
    score = asked.score or next(iter(names), None)
    folder = asked.results if asked.results.is_dir() else asked.results.parent
    out = asked.out or folder / "figures"
    parts = sweeps(folder, rounds)
    try:
        for name, (_, part) in parts.items():
            place = out / name if len(parts) > 1 else out
            place.mkdir(parents=True, exist_ok=True)
            for title, figure in every_figure(part, score):
                for path in save(figure, place / title):
                    print(f"figure    {path}")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out.") from None


if __name__ == "__main__":
    try:
        main(tyro.cli(Question))
    except UserError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
