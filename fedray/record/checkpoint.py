"""The state of a run between rounds, on disk: named tensors in one safetensors file, and rows of rounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedray.errors import UserError
from fedray.lazy import torch
from fedray.vector import Layout, load, load_checked, save

KEYS = ("round", "layout", "rows", "row", "ema")  # of the metadata


@dataclass(frozen=True, eq=False)
class State:
    """Everything that the next round depends on, except the memories of clients.

    round: complete rounds;  tensors: the server's, by name: "model" [d], and the algorithm's own.
    """

    round: int
    tensors: dict[str, torch.Tensor]


def save_state(path: Path, state: State, layout: Layout, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a state and the rows of its round and of those before it that have none: complete or not at all."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    metadata = {"round": str(state.round), "layout": json.dumps(shapes), "rows": json.dumps(list(rows))}
    save(path, state.tensors, metadata)


def load_state(path: Path, layout: Layout) -> State:
    """Read a state; also one that a version before named state wrote.

    Raises:
        UserError: it is damaged, or of another model.
    """
    tensors, metadata = load_checked(path, KEYS)
    if "layout" not in metadata:
        return _load_format_1(path, layout)
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["layout"]).items()}
        number = int(metadata["round"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    _check_layout(path, shapes, layout)
    return State(number, tensors)


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["rows"]) if "rows" in metadata else [json.loads(metadata["row"])]


def _check_layout(path: Path, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in shapes:
            raise UserError(f"{path} has no tensor {name!r}: it is of another model.")
        if shapes[name] != shape:
            raise UserError(
                f"{path}: {name!r} has shape {list(shapes[name])}, not {list(shape)}: it is of another model."
            )


def _load_format_1(path: Path, layout: Layout) -> State:
    """Read a checkpoint of format 1: the model's parameters by name, those of its average as `ema.NAME`, and `base`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata(), set(file.keys())
            tensors = {"base": file.get_tensor("base")} if "base" in names and "base" not in layout.names else {}
        tensors["model"] = load(path, layout)
        if metadata["ema"] == "True":
            tensors["ema/model"] = load(path, layout, "ema.")
    except ValueError as error:
        raise UserError(str(error)) from None
    return State(int(metadata["round"]), tensors)
