"""Runs that were not made to be compared: a chapter for each dataset, and names that stay short."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from fedray.reports.answer import field_of, value_of, with_settings
from fedray.reports.results import varied

MOST = 4  # settings that may differ, beside the seed, for runs to be called by their values


def by_dataset(rounds: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Divide runs by the data that they learn from: scores on different data do not compare. Yields its name, too."""
    columns = [name for name in ("task.train_data_dir", "task.dataset_name", "task.name") if name in rounds]
    data = rounds[columns].bfill(axis=1).iloc[:, 0].astype(str)
    for name, rows in rounds.groupby(data, sort=False):
        yield value_of(name), rows


def named(rounds: pd.DataFrame) -> tuple[pd.DataFrame, list[str], str]:
    """Add a column "setting": what varies, in words; or where that is too much, the directory of each run.

    Returns also the columns that vary (none, where they name nothing), and where there are too many, that sentence.
    """
    free = varied(rounds)
    if len(free) <= MOST:
        return with_settings(rounds, free), free, ""
    paths = {directory: Path(directory).resolve() for directory in rounds["directory"].unique()}
    above = len(Path(*_common([path.parent.parts for path in paths.values()])).parts)
    names = {directory: "/".join(path.parts[above:]) for directory, path in paths.items()}
    ordered = with_settings(rounds, []).assign(setting=lambda frame: frame["directory"].map(names))
    some = ", ".join(map(field_of, free[:MOST]))
    said = f"These runs differ in {len(free)} settings ({some}, …): each is called by its directory."
    return ordered, [], said


def _common(places: list[tuple[str, ...]]) -> list[str]:
    """Return what paths have in common, from the beginning."""
    shared = []
    for parts in zip(*places, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
