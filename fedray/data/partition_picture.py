"""A table and a picture of a partition."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache, partial

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedray.data.dataset import Dataset
from fedray.data.partition import Shards

SHOWN = 200  # clients in the picture
FEW = 64  # a column with more values than this (identities, file names) is not broken down
DIFFERENT = "different values of"


def table(dataset: Dataset, parts: Mapping[str, Shards]) -> pd.DataFrame:
    """Tabulate clients, a row for each: its examples, those of each part (train, held out, test), and its shares.

    Shares are of all its examples: of each label ("label 3"), folder or other value, and of each attribute that is
    true. Of a column of more than 64 values (identities) it has how many different ones the client holds.
    """
    sizes = np.stack([shards.sizes for shards in parts.values()])  # [parts, clients]
    examples = sizes.sum(0)
    frame = pd.DataFrame({"client": range(len(examples)), "examples": examples} | dict(zip(parts, sizes, strict=True)))
    order = np.concatenate([shards.indices for shards in parts.values()])
    owner = np.concatenate([np.repeat(np.arange(len(examples)), shards.sizes) for shards in parts.values()])
    shares = {}
    for name, column in _columns(dataset).items():
        values, codes = np.unique(column, return_inverse=True)
        if len(values) == len(column) > FEW:  # names, of which every example has its own
            continue
        if len(values) > FEW:
            held = np.unique(owner * len(values) + codes[order]) // len(values)
            shares[f"{DIFFERENT} {name}"] = np.bincount(held, minlength=len(examples))
            continue
        counts = np.bincount(owner * len(values) + codes[order], minlength=len(examples) * len(values))
        for value, count in zip(values, counts.reshape(len(examples), len(values)).T, strict=True):
            if column.dtype != bool:
                shares[f"{name} {value}"] = count / examples
            elif value:
                shares[f"{name} (column)" if name in frame else name] = count / examples
    return pd.concat([frame, pd.DataFrame(shares)], axis=1)


def draw(table: pd.DataFrame, parts: tuple[str, ...]) -> bytes:
    """Draw the first 200 clients of a table as a PNG."""
    return _drawn(table[:SHOWN].to_csv(index=False), parts)


@lru_cache(maxsize=16)  # runs of one process, as clients alone and trials, often have the same table
def _drawn(table: str, parts: tuple[str, ...]) -> bytes:
    png = io.BytesIO()
    _picture(pd.read_csv(io.StringIO(table)), list(parts)).savefig(png, dpi=100, format="png")
    return png.getvalue()


def _columns(dataset: Dataset) -> dict[str, np.ndarray]:
    columns = dict(dataset.columns)
    if dataset.labels is not None and not any(map(partial(_same, dataset.labels), columns.values())):
        columns = {"label": dataset.labels, **columns}
    return {name: column for name, column in columns.items() if column.dtype.kind in "biuUO"}


def _same(labels: np.ndarray, column: np.ndarray) -> bool:
    """Tell whether the labels number a column's values (folders, identities): then that column is shown instead."""
    groups = np.unique(np.stack([labels, np.unique(column, return_inverse=True)[1]]), axis=1).shape[1]
    return groups == len(np.unique(labels)) == len(np.unique(column))


def _picture(frame: pd.DataFrame, parts: list[str]) -> Figure:
    """Draw each client's number of examples, and its shares as shades."""
    shares = frame.drop(columns=["client", "examples", *parts])
    shares = shares[[name for name in shares if not str(name).startswith(DIFFERENT)]]
    rows = max(3.0, min(12.0, 0.2 * len(frame)))
    figure = Figure(
        figsize=(5 + (min(10, 0.25 * shares.shape[1] + 1.5) if shares.shape[1] else 0), rows), layout="constrained"
    )
    axes = figure.subplots(1, 2 if shares.shape[1] else 1, sharey=True, squeeze=False)[0]
    left = np.zeros(len(frame))
    colours = matplotlib.colormaps["cividis"](np.linspace(0.1, 0.9, len(parts)))
    for part, colour in zip(parts, colours, strict=True):
        if frame[part].any():
            axes[0].barh(frame["client"], frame[part], left=left, color=colour, label=part)
            left += frame[part].to_numpy()
    axes[0].set(xlabel="examples", ylabel="client")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    axes[0].invert_yaxis()
    axes[0].legend()
    if shares.shape[1]:
        image = axes[1].imshow(shares, aspect="auto", cmap="cividis", vmin=0)
        axes[1].set_xticks(range(shares.shape[1]), shares.columns, rotation=90, fontsize=7)
        figure.colorbar(image, ax=axes[1], label="share of the client's examples")
    return figure
