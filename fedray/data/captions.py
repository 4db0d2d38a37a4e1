"""Captions of images, from the places where people put them."""

import re
from pathlib import Path

import numpy as np

from fedray.data.dataset import Dataset
from fedray.errors import UserError
from fedray.files import read_text
from fedray.storage import shown


def captions_of(dataset: Dataset, source: str, column: str, instance_prompt: str | None) -> list[str]:
    """Return a caption for each image.

    It is the one prompt for all, else from a column of the dataset or of its metadata file, else from a text file
    beside each image, else the name of its folder.

    Args:
        source: the folder of the images, or the dataset's name.

    Raises:
        UserError: the column is not there, or some images have no caption.
    """
    columns = dataset.columns
    if instance_prompt is not None:
        return [instance_prompt] * len(dataset)
    if column in columns:
        captions = ["" if value != value else str(value).strip() for value in columns[column]]
    elif "file_name" not in columns or set(columns) > {"folder", "file_name"} or column != "text":
        known = ", ".join(name for name in columns if name not in ("folder", "file_name")) or "nothing"
        raise UserError(
            f"{shown(Path(source))} has no column {column!r} of captions, but {known}: name it with --caption-column, "
            f"or give one --instance-prompt."
        )
    else:
        captions = _from_files(Path(source), columns["file_name"])
    if not all(captions):
        names = columns.get("file_name", np.arange(len(dataset)))
        first = names[captions.index("")]
        missing = f"{captions.count('')} images have no caption, the first of them {first}"
        raise UserError(f"{shown(Path(source))}: {missing}.")
    return captions


def _from_files(root: Path, names: np.ndarray) -> list[str]:
    """Read captions from a text file beside each image, else take the names of folders."""
    for name in map(str, names):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{shown(root)}: the file_name {name} leads out of its folder.")
    beside = [(root / str(name)).with_suffix(".txt") for name in names]
    there = [path.is_file() for path in beside]
    if not any(there):
        return [re.sub(r"[_\W]+", " ", (root / str(name)).parent.name).strip() for name in names]
    if not all(there):
        absent = beside[there.index(False)]
        raise UserError(f"{shown(absent)} is absent: where some images have a caption in a text file, all must.")
    return [read_text(path).strip() for path in beside]
