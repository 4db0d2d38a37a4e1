"""Images of any kind as one uint8 array: decoded once per node, then memory-mapped by every process."""

import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from rich.console import Console
from rich.progress import track

from fedray import cache
from fedray.data.buckets import Size, nearest, path_of
from fedray.errors import UserError, check_text, reason
from fedray.lazy import torch
from fedray.seeds import generator
from fedray.storage import shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pgm", ".ppm", ".bmp", ".tif", ".tiff")
VERSION = 2  # of what `decode` makes of an image: part of the cache's key
CHUNK = 32  # images that a thread decodes at a time
LARGEST = 2**26  # pixels of an image: those of one that is decoded take some ten bytes each
LARGE = 2**24  # pixels above which one image is decoded at a time
LARGEST_FILE = 2**26  # bytes of a file in an archive

_alone = threading.Lock()  # held while a large image is decoded


@dataclass(frozen=True)
class Form:
    """The form that every image is brought into."""

    resolution: int  # height and width, in pixels
    channels: int  # 1 grey, 3 RGB
    crop: int | None = None  # side of the central square that is kept, in pixels; None: the largest
    sizes: tuple[Size, ...] = ()  # to which images are brought besides, each to the nearest


class Decoded(NamedTuple):
    """A source's images in the cache."""

    path: Path  # of the array: uint8 [n, channels, resolution, resolution]
    positions: np.ndarray  # int64 [n], of its rows among the source's images: some may be unreadable
    sha256: str  # of the images


def decode(source: Path | bytes, form: Form, size: Size | None = None) -> np.ndarray:
    """Decode one image as uint8 [channels, resolution, resolution], or of a size [channels, height, width].

    Turned upright (EXIF), its first frame if it is animated, its central square (or the largest part in its centre that
    has the size's aspect ratio), resized by an antialiased bicubic filter. 16-bit images keep their upper 8 bits; CMYK,
    palettes and transparency become plain RGB or grey.

    Raises:
        Exception: whatever Pillow raises for a file that is no image, or a damaged one.
    """
    with open_image(source) as opened, _alone if math.prod(opened.size) > LARGE else nullcontext():
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers, which have no known range")
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        elif image.mode == "P":  # through RGBA: Pillow warns of transparency otherwise
            image = image.convert("RGBA")
        image = image.convert("L" if form.channels == 1 else "RGB")
        if size is None:
            size, high = (form.resolution,) * 2, min(*image.size, form.crop or min(image.size))
            wide = high
        else:
            scale = min(image.height / size[0], image.width / size[1])
            high, wide = (max(1, round(scale * side)) for side in size)
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        part = image.crop((left, top, left + wide, top + high))
        pixels = np.asarray(part.resize(size[::-1], Image.Resampling.BICUBIC))
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def open_image(source: Path | bytes) -> Image.Image:
    """Open an image, without decoding it. Raises what Pillow raises, and ValueError where it is too large."""
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a file")  # a named pipe would be waited for
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than the {LARGEST:,} pixels that are decoded") from None
    if math.prod(opened.size) > LARGEST:
        opened.close()
        raise ValueError(f"it has {math.prod(opened.size):,} pixels, more than the {LARGEST:,} that are decoded")
    return opened


def cached(
    what: str,
    names: Sequence[str],
    stamp: object,
    read: Callable[[int], Path | bytes],
    form: Form,
    skip: bool,
    limit: int | None = None,
) -> Decoded:
    """Decode the images that `read(i)` gives into the cache, unless they are there already.

    Args:
        what: the source, for messages.
        names: of the images, for messages.
        stamp: JSON that changes whenever the images do.
        skip: leave out images that cannot be read, instead of refusing.
        limit: how many of them to take, as `some` does; None takes all.

    Raises:
        UserError: images cannot be read; names the first of them.
    """
    taken = some(len(names), limit)
    names = [names[index] for index in taken]

    def make(aside: Path) -> None:
        unreadable, passing = _decode_all(what, names, lambda row: read(int(taken[row])), form, aside / "images.npy")
        if passing and not skip:  # not kept: a permission, say, can be mended without a trace
            raise _refusal(what, names, unreadable)
        about: dict[str, object] = {"unreadable": unreadable}
        about["sha256"] = sha256(np.load(aside / "images.npy", mmap_mode="r"))
        if form.sizes:
            rows = [row for row in range(len(names)) if row not in unreadable]
            about["buckets_sha256"] = _decode_buckets(what, lambda i: read(int(taken[rows[i]])), len(rows), form, aside)
        (aside / "about.json").write_text(json.dumps(about))

    shape = astuple(form) if form.sizes else astuple(form)[:-1]
    key = [VERSION, stamp, shape, *([] if limit is None else [limit])]
    place = cache.kept(f"decoding {what}", key, make)
    about = json.loads((place / "about.json").read_text())
    unreadable = {int(index): said for index, said in about["unreadable"].items()}
    if unreadable and not skip:
        raise _refusal(what, names, unreadable)
    positions = np.array([row for row in range(len(names)) if row not in unreadable])
    return Decoded(place / "images.npy", taken[positions], about["sha256"])


def some(count: int, limit: int | None) -> np.ndarray:
    """Draw `limit` of so many examples without replacement, ascending: int64; all where there are no more.

    The same ones for every seed of a run, so that seeds share their data.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return torch.randperm(count, generator=generator(0, "max_train_samples"))[:limit].sort().values.numpy()


def form_of(directory: Path) -> tuple[int, int]:
    """Return the resolution and channels (1 or 3) that all images below a directory have.

    Raises:
        UserError: there are none, or they are not square, or differ in size or mode: then nothing could be compared
            with them before they were resized, which moves scores.
    """
    first: tuple[str, tuple[int, int], int] | None = None
    for path in images_below(directory, flag=""):
        try:
            with open_image(path) as opened:
                size, channels = opened.size, 1 if opened.mode in ("L", "1", "I;16", "I", "F") else 3
        except Exception as error:  # Pillow has no common error for damaged images
            raise UserError(f"{shown(path)} cannot be read: {reason(error)}.") from None
        if size[0] != size[1]:
            raise UserError(f"{shown(path)} is {size[0]}×{size[1]}: only square images can be scored; crop them first.")
        if first is None:
            first = (path.name, size, channels)
        if (size, channels) != first[1:]:
            raise UserError(
                f"{shown(path)} is {size[0]}×{size[1]} in {channels} channels, and {first[0]} {first[1][0]}×"
                f"{first[1][1]} in {first[2]}: images that are scored together must have one size and mode."
            )
    assert first is not None
    return first[1][0], first[2]


def images_below(directory: Path, flag: str = "--train-data-dir ") -> list[Path]:
    """List the image files below a directory, sorted, without hidden ones. Raises `UserError` where there are none."""
    if not directory.is_dir():
        wrong = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{flag}{shown(directory)} {wrong}.")
    check_text(str(directory))
    paths, seen = [], set()
    for folder, below, found in os.walk(directory, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # links may go in a circle
            below.clear()
            continue
        seen.add(real)
        names = [name for name in found if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            check_text(str(path))
            paths.append(path)
    if not paths:
        raise UserError(f"{flag}{shown(directory)} has no images ({' '.join(SUFFIXES)}).")
    return sorted(paths)


def sha256(images: np.ndarray) -> str:
    """Return the SHA-256 of an array of images and its shape."""
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]).data)
    return digest.hexdigest()


def _decode_all(
    what: str, names: Sequence[str], read: Callable[[int], Path | bytes], form: Form, path: Path
) -> tuple[dict[int, str], bool]:
    """Decode in parallel into `path`; return why some failed, and whether the cause may be temporary."""
    shape = (len(names), form.channels, form.resolution, form.resolution)
    _check_room(what, path.parent, math.prod(shape))
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    unreadable: dict[int, str] = {}
    passing = False

    def some(start: int) -> None:
        nonlocal passing
        for index in range(start, min(start + CHUNK, len(names))):
            try:
                images[index] = decode(read(index), form)
            except Exception as error:  # Pillow has no common error for damaged images
                said = reason(error)
                unreadable[index] = "not an image" if "cannot identify" in said else said
                passing |= isinstance(error, MemoryError) or getattr(error, "errno", None) is not None

    _in_threads(what, some, range(0, len(names), CHUNK))
    if len(unreadable) == len(names):
        raise _refusal(what, names, unreadable)
    if unreadable:
        kept = [index for index in range(len(names)) if index not in unreadable]
        for row, index in enumerate(kept):  # row ≤ index, so nothing is overwritten before it is moved
            images[row] = images[index]
        whole = path.with_name("whole.npy")
        path.rename(whole)
        compact = np.lib.format.open_memmap(path, "w+", np.uint8, (len(kept), *images.shape[1:]))
        compact[:] = images[: len(kept)]
        whole.unlink()
        images = compact
    images.flush()
    return dict(sorted(unreadable.items())), passing


def _decode_buckets(what: str, read: Callable[[int], Path | bytes], count: int, form: Form, place: Path) -> str:
    """Decode so many readable images once more, each to the nearest of the form's sizes; return the SHA-256 of all."""
    which, rows = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def measure(start: int) -> None:
        for index in range(start, min(start + CHUNK, count)):
            with open_image(read(index)) as opened:
                turned = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90°
                height, width = opened.size if turned else opened.size[::-1]
            which[index] = nearest(height, width, form.sizes)

    _in_threads(what, measure, range(0, count, CHUNK))
    used, which = np.unique(which, return_inverse=True)
    sizes, arrays = [form.sizes[index] for index in used], []
    shapes = [(int(n), form.channels, *size) for n, size in zip(np.bincount(which), sizes, strict=True)]
    _check_room(what, place, sum(map(math.prod, shapes)))
    for bucket, shape in enumerate(shapes):
        members = np.flatnonzero(which == bucket)
        rows[members] = np.arange(len(members))
        arrays.append(np.lib.format.open_memmap(path_of(place, bucket), "w+", np.uint8, shape))

    def some(start: int) -> None:
        for index in range(start, min(start + CHUNK, count)):
            arrays[which[index]][rows[index]] = decode(read(index), form, sizes[which[index]])

    _in_threads(what, some, range(0, count, CHUNK))
    for array in arrays:
        array.flush()
    np.save(place / "buckets.npy", np.stack([which, rows]))
    sums = [hashlib.sha256(which.tobytes()).hexdigest(), *map(sha256, arrays)]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def _check_room(what: str, place: Path, need: int) -> None:
    """Raise `UserError` where the disk has less room: a mapped file that finds it full kills the process."""
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"{what}: decoded it takes {need / 1e9:.2f} GB, and {place.parent} has {free / 1e9:.2f} GB free; set "
            f"FEDRAY_CACHE to a directory on another disk."
        )


def _in_threads(what: str, some: Callable[[int], None], starts: Sequence[int]) -> None:
    """Do some images at a time on all cores, with a progress bar: Pillow decodes and resizes without Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        done = threads.map(some, starts)
        for _ in track(done, f"decoding {what}", len(starts), console=Console(stderr=True), transient=True):
            pass


def _refusal(what: str, names: Sequence[str], unreadable: dict[int, str]) -> UserError:
    first = "; ".join(f"{names[index]} ({said})" for index, said in list(unreadable.items())[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return UserError(
        f"{what}: {len(unreadable)} of {len(names)} images cannot be read: {first}{more}. Mend or remove them, or "
        f"leave them out with --skip-unreadable."
    )
