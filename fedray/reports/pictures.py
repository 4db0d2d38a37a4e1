"""The pictures of a report: samples of each setting over rounds, made to fit."""

import base64
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fedray.reports.charts import thinned
from fedray.storage import located

KINDS = {  # of a run's files: title, and what a picture shows
    "samples": ("Samples", "Samples"),
    "validation": ("Samples by prompt, from the same noise", "A strip of samples by prompt"),
    "validation.png": ("Prompts, from the base to the last round", "Samples by prompt over rounds"),
    "nearest.png": ("Samples above the training images nearest to them", "Samples, nearest images"),
    "partition.png": ("Who holds what", "How many images each client holds"),
}
# Rounds of a run, pixels of a picture's longer side, and bytes above which it is compressed: the first that fit.
SIZES = (
    (12, 1600, 40_000), (6, 1600, 40_000), (6, 1000, 20_000), (3, 1000, 20_000), (3, 700, 10_000), (1, 700, 10_000),
    (1, 400, 4_000), (1, 200, 2_000),
)  # fmt: skip

Size = tuple[int, int, int]

Chosen = dict[str, tuple[str, dict[str, list[int]]]]
"""By a run's directory: its name on the page, and for each kind that is shown of it the settings that it stands for."""


def viewers(chapters: Sequence[Chosen], room: int) -> list[list[dict[str, Any]]]:
    """Choose the pictures of each chapter, after as many rounds and as large as there is room for.

    Args:
        room: characters.
    """
    for size in SIZES:
        found = [_viewers(chosen, size, None) for chosen in chapters]
        if sum(map(_size, found)) <= room:
            return found
    left = [room]
    return [_viewers(chosen, SIZES[-1], left) for chosen in chapters]


def _size(found: list[dict[str, Any]]) -> int:
    return sum(len(frame["src"]) for viewer in found for run in viewer["runs"] for frame in run["frames"])


def _viewers(chosen: Chosen, size: Size, left: list[int] | None) -> list[dict[str, Any]]:
    """Make a viewer for each kind; without the runs for which nothing of the room is left."""
    made = []
    for source, (title, alt) in KINDS.items():
        runs = []
        for directory, (name, of) in chosen.items():
            frames = _frames(directory, source, f"{alt}: {name}", size) if source in of else []
            if left is not None:
                needed = sum(len(frame["src"]) for frame in frames)
                frames = frames if needed <= left[0] else []
                left[0] -= needed if frames else 0
            if frames:
                runs.append({"name": name, "of": of[source], "frames": frames})
        if runs:
            made.append({"title": title, "kind": source.removesuffix(".png"), "runs": runs})
    return made


def _frames(directory: str, source: str, alt: str, size: Size) -> list[dict[str, Any]]:
    pictures, (rounds, *large) = _pictures(located(directory), source), size
    frames = []
    for number, path in (pictures[index] for index in thinned(len(pictures), rounds)):
        label = "" if number is None else f"round {number}" if number else "base"
        if src := _data_uri(path, *large):
            frames.append({"number": number or 0, "label": label, "src": src, "alt": f"{alt} {label}".strip()})
    return frames


def _pictures(directory: Path, source: str) -> list[tuple[int | None, Path]]:
    """Find a run's pictures of a kind, with the round that they are of."""
    if source.endswith(".png"):
        return [(None, directory / source)] if (directory / source).exists() else []
    paths = sorted(directory.glob(f"{source}/round-*.png"))
    return [(int(path.stem.removeprefix("round-")), path) for path in paths]


@functools.lru_cache(4096)
def _data_uri(path: Path, pixels: int, most: int) -> str:
    """Encode a picture as text, compressed where it is large; as nothing if it cannot be read."""
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > most or max(image.size) > pixels:
                image.thumbnail((pixels, pixels))
                small = io.BytesIO()
                image.convert("RGB").save(small, "webp", quality=80)
                if small.tell() < len(data):
                    data, kind = small.getvalue(), "webp"
    except OSError:
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
