"""Tables of scores by settings: over seeds, and as text for a page or a paper."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from fedray.errors import UserError, check_name
from fedray.reports.comparisons import rms
from fedray.reports.results import RUN, finals, scores_of, settings_of, varied

NONE = "–"


def pivot(rounds: pd.DataFrame, score: str, rows: str = "clients", columns: str = "local_epochs") -> pd.DataFrame:
    """Tabulate a score after the last round by two settings, over the seeds of complete runs.

    Columns are pairs: a value of `columns`, and mean, std (NaN with one seed) or n (how many seeds). `score` may also
    be loss, or another number that `load` has.

    Raises:
        UserError: no run has the score or a setting; or the runs of a cell differ in more than their seeds.
    """
    settings = settings_of(rounds)
    if score not in rounds or score in (*RUN, *settings, "round"):
        check_name("score", score, scores_of(rounds))
    for name in (rows, columns):
        check_name("setting", name, settings)
    last = finals(rounds)
    last = last[last[score].notna()].astype({score: float})
    if last.empty:
        raise UserError(f"no complete run has {score}.")
    for name in {rows, columns}:
        if last[name].hasnans:
            last[name] = last[name].astype(object).where(last[name].notna(), NONE)
    groups = last.groupby([rows, columns])
    for (row, column), runs in groups:
        if differ := varied(runs):
            raise UserError(
                f"runs at {rows} {row} and {columns} {column} differ also in {', '.join(differ)}: choose one value of "
                f"it, or make it the rows or the columns."
            )
    over_seeds = groups[score].agg(mean="mean", std="std", n="count").unstack(columns)
    values = over_seeds["n"].columns
    table = {(value, name): over_seeds[name][value] for value in values for name in ("mean", "std", "n")}
    for value in values:
        table[value, "n"] = table[value, "n"].fillna(0).astype("Int64")
    frame = pd.DataFrame(table)
    frame.columns.names = [columns, None]
    return frame


def cells(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """Write a table of `pivot` as text: "5.53 ± 1.69", "5.53" of one seed, "–" where there is none.

    Mean and std have as many decimals as give the larger of them `digits` digits.
    """
    values = table.columns.get_level_values(0).unique()
    text = {
        value: [_cell(mean, std, digits) for mean, std in zip(table[value]["mean"], table[value]["std"], strict=True)]
        for value in values
    }
    return pd.DataFrame(text, index=table.index, columns=values)


def _cell(mean: float, std: float, digits: int) -> str:
    if pd.isna(mean):
        return NONE
    size = max(abs(number) for number in (mean, std) if not pd.isna(number))
    decimals = max(0, digits - 1 - (math.floor(math.log10(size)) if 0 < size < math.inf else 0))
    return f"{mean:.{decimals}f}" + ("" if pd.isna(std) else f" ± {std:.{decimals}f}")


def to_markdown(table: pd.DataFrame) -> str:
    """Write a table of `cells` as Markdown."""
    escaped = _with_corner(table).rename(columns=str).map(str)
    escaped.columns = [name.replace("|", "\\|") for name in escaped.columns]
    return escaped.map(lambda text: text.replace("|", "\\|")).to_markdown(index=False, disable_numparse=True)


def to_latex(table: pd.DataFrame) -> str:
    """Write a table of `cells` as LaTeX (with the package booktabs)."""
    plain = _with_corner(table)
    latex = plain.to_latex(index=False, escape=True, column_format="l" + "r" * (plain.shape[1] - 1))
    return latex.replace("±", r"$\pm$").replace(NONE, "--")


def _with_corner(table: pd.DataFrame) -> pd.DataFrame:
    """Make the index a first column, under the names of both settings."""
    flat = pd.DataFrame(table.to_numpy(), columns=[NONE if pd.isna(name) else str(name) for name in table.columns])
    labels = [NONE if pd.isna(name) else str(name) for name in table.index]
    flat.insert(0, f"{table.index.name} / {table.columns.name}", labels)
    return flat


def by_setting(rounds: pd.DataFrame, settings: Mapping[str, str], name: str, scores: list[str]) -> pd.DataFrame:
    """Tabulate scores after the last round by setting, over the seeds of complete runs; also settings without any.

    Columns are pairs: a score, and mean, std (over seeds; NaN with one), n (seeds) or within (the standard deviation
    over draws or resamples of one run's samples, as a root mean square over its seeds; it is a part of std).

    Args:
        settings: of each run, by the name of its directory, in the order of the rows.
        name: of the index.
    """
    last = finals(rounds)
    setting = last["run"].map(settings).astype(str).rename(name)
    table = last[scores].astype(float).groupby(setting, sort=False).agg(["mean", "std", "count"])
    table = table.rename(columns={"count": "n"}, level=1).reindex(list(dict.fromkeys(settings.values())))
    for score in scores:
        table[score, "n"] = table[score, "n"].fillna(0).astype("Int64")
        if f"{score}.std" in last:
            table[score, "within"] = last[f"{score}.std"].groupby(setting, sort=False).agg(rms)
    kinds = ("mean", "std", "n", "within")
    table = table[[(score, kind) for score in scores for kind in kinds if (score, kind) in table]]
    table.index.name = name
    table.columns.names = ["score", None]
    return table


def shown(value: Any) -> str:
    """Write a setting's value as text."""
    return NONE if value is None else str(value)
