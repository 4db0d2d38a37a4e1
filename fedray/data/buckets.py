"""Images in sizes of several aspect ratios, to be trained on; beside them are the squares that others look at."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Size = tuple[int, int]  # height and width, in pixels


def sizes_in(text: str) -> tuple[Size, ...]:
    """Read sizes in the form of diffusers' scripts, HEIGHT,WIDTH;HEIGHT,WIDTH …. Raises ValueError."""
    found = [re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", each) for each in text.split(";")]
    sizes = [(int(each[1]), int(each[2])) for each in found if each is not None]
    if len(sizes) < len(found):
        raise ValueError("it must be HEIGHT,WIDTH;HEIGHT,WIDTH and so on, as 512,512;384,640")
    if len(set(sizes)) < len(sizes):
        raise ValueError("a size is there twice")
    return tuple(sizes)


def nearest(height: int, width: int, sizes: Sequence[Size]) -> int:
    """Return which size an image goes to: that of the least |h W − w H|, the last of equal ones, as in diffusers."""
    far = [abs(height * w - width * h) for h, w in sizes]
    return len(far) - 1 - far[::-1].index(min(far))


@dataclass(frozen=True, eq=False)
class Buckets:
    """A dataset's images by their sizes, mapped: image i is row `rows[i]` of array `which[i]`.

    arrays: uint8 [m, channels, height, width] for each size;  which, rows: int64 [n];  sha256: of all.
    """

    arrays: Sequence[np.ndarray]
    which: np.ndarray
    rows: np.ndarray
    sha256: str

    @classmethod
    def open(cls, place: Path) -> "Buckets | None":
        """Open those of an entry of the cache; None where its images have one size."""
        sha256 = json.loads((place / "about.json").read_text()).get("buckets_sha256")
        if sha256 is None:
            return None
        which, rows = np.load(place / "buckets.npy")
        arrays = [np.load(path_of(place, index), mmap_mode="r") for index in range(which.max() + 1)]
        return cls(arrays, which, rows, sha256)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return an image, uint8 [channels, height, width]."""
        return self.arrays[self.which[index]][self.rows[index]]


def path_of(place: Path, index: int) -> Path:
    """Return the file of the images of one size, in an entry of the cache."""
    return place / f"bucket-{index}.npy"
