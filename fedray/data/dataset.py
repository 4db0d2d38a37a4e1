"""Datasets: images as one uint8 array, their labels and columns."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedray import cache
from fedray.data.buckets import Buckets
from fedray.data.images import sha256
from fedray.errors import UserError

VERSION = 2  # of what is cached of a dataset beside its images
GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples fill 0 … 1 evenly, however many there are


class Source(NamedTuple):
    """A dataset's entry in this node's cache, and the SHA-256 of its images."""

    place: Path
    sha256: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images, their labels and their columns.

    images: uint8 [n, channels, height, width];  labels: int64 [n] or None;  columns: by name, [n] each: folder or
    identity, attributes, and whatever a metadata file has;  source: where other processes of this node find the same.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: "Source | None" = None

    @classmethod
    def open(cls, place: Path, columns: Sequence[str] | None = None) -> "Dataset":
        """Open a dataset that is cached on this node, memory-mapped, without listing its files again.

        Args:
            columns: those to read, where there are such; None reads all.
        """
        about = json.loads((place / "about.json").read_text())
        labels = np.load(place / "labels.npy", mmap_mode="r") if about["labels"] else None
        wanted = [name for name in about["columns"] if columns is None or name in columns]
        found: dict[str, np.ndarray] = {}
        if wanted:
            import pandas as pd  # takes half a second to import

            table = pd.read_parquet(place / "columns.parquet", columns=wanted)
            found = {str(name): table[name].to_numpy() for name in table}
        images = np.load(place / about["images"], mmap_mode="r")
        return cls(images, labels, found, Source(place, about["sha256"]))

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the images in this form, by which runs and references recognise them."""
        return self.source.sha256 if self.source else sha256(self.images)

    @cached_property
    def buckets(self) -> Buckets | None:
        """The images in sizes of several aspect ratios; None where they were not asked for."""
        if self.source is None:
            return None
        images = Path(json.loads((self.source.place / "about.json").read_text())["images"])
        return Buckets.open(images.parent) if (images.parent / "about.json").exists() else None

    def labels_like(self, n: int) -> np.ndarray:
        """Return n labels in the dataset's proportions, int64 [n]; fewer are the first of them.

        They are those of the examples, sorted by label, at the fractional parts of 0, φ, 2 φ …
        """
        assert self.labels is not None
        places = (np.arange(n) * GOLDEN % 1.0 * len(self)).astype(np.int64)
        return np.sort(self.labels)[places]

    def with_column(self, name: str, values: np.ndarray) -> "Dataset":
        """Return the dataset with one more column [n]; other processes of this node find it too."""
        columns = {**self.columns, name: values}
        if self.source is None:
            return replace(self, columns=columns)
        images = Path(json.loads((self.source.place / "about.json").read_text())["images"])
        return keep(images, self.source.sha256, self.labels, columns)

    def column(self, name: str) -> np.ndarray:
        """Return a column by name; "label" are the labels. Raises `UserError` with the names that there are."""
        columns = dict(self.columns) if self.labels is None else {"label": self.labels, **self.columns}
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"the partition needs a column {name!r}{hint}, and of its images this dataset knows "
                f"{', '.join(columns) or 'nothing'}."
            )
        return columns[name]


def is_cached(place: Path) -> bool:
    """Tell whether a dataset's entry, and that of its images, are in this node's cache undamaged."""
    if not cache.is_whole(place):
        return False
    return cache.is_whole(Path(json.loads((place / "about.json").read_text())["images"]).parent)


def keep(images: Path, sha256: str, labels: np.ndarray | None, columns: Mapping[str, np.ndarray]) -> Dataset:
    """Save labels and columns of cached images in this node's cache, and return the dataset."""
    known, names = np.zeros(0, np.int64) if labels is None else np.asarray(labels), list(columns)
    contents, table = hashlib.sha256(known.tobytes()), None
    if columns:
        import pandas as pd  # takes half a second to import

        table = pd.DataFrame(dict(columns))
        contents.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())

    def make(aside: Path) -> None:
        about = {"images": str(images), "sha256": sha256, "labels": labels is not None, "columns": names}
        (aside / "about.json").write_text(json.dumps(about))
        np.save(aside / "labels.npy", known)
        if table is not None:
            table.to_parquet(aside / "columns.parquet")

    key = ["dataset", VERSION, str(images), names, labels is not None, contents.hexdigest()]
    return Dataset.open(cache.kept("labels", key, make))
