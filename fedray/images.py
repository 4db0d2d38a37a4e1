"""Images of any kind as one uint8 array: decoded once per node, then memory-mapped by every process."""

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from fedray.choices import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pgm", ".ppm", ".bmp", ".tif", ".tiff")
VERSION = 1  # of what `decode` makes of an image: part of the cache's key
CHUNK = 32  # images that a thread decodes at a time
LOCK_TIMEOUT = 7200.0  # seconds to wait for another process that decodes the same images


@dataclass(frozen=True)
class Form:
    """What every image is made into."""

    resolution: int  # height and width, in pixels
    channels: int  # 1 grey, 3 RGB
    crop: int | None = None  # side of the central square that is kept, in pixels; None: the largest


def decode(source: Path | bytes, form: Form) -> np.ndarray:
    """One image as uint8 [channels, resolution, resolution].

    Turned upright (EXIF), its first frame if it is animated, its central square, resized by an antialiased bicubic
    filter. 16-bit images keep their upper 8 bits; CMYK, palettes and transparency become plain RGB or grey.

    Raises:
        Exception: whatever Pillow raises for a file that is no image, or a damaged one.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        elif image.mode == "P":  # through RGBA: Pillow warns of transparency otherwise
            image = image.convert("RGBA")
        image = image.convert("L" if form.channels == 1 else "RGB")
        side = min(*image.size, form.crop or min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        pixels = np.asarray(square.resize((form.resolution, form.resolution), Image.Resampling.BICUBIC))
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def cached(
    what: str, names: Sequence[str], stamp: object, read: Callable[[int], Path | bytes], form: Form, skip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The images that `read(i)` gives, decoded into the cache unless they are there already.

    Args:
        what: the source, for messages.
        names: of the images, for messages.
        stamp: JSON that changes whenever the images do.
        skip: leave out images that cannot be read, instead of refusing.

    Returns:
        uint8 [n, channels, resolution, resolution], memory-mapped, and the positions in `names` of its rows.

    Raises:
        UserError: images cannot be read; names the first of them.
    """
    key = hashlib.sha256(json.dumps([VERSION, stamp, astuple(form)]).encode()).hexdigest()[:24]
    place = cache_directory() / key
    with _locked(place.with_suffix(".lock"), what):
        if not place.exists():
            aside = place.with_suffix(".aside")
            shutil.rmtree(aside, ignore_errors=True)  # a writer that was killed left it
            aside.mkdir(parents=True)
            try:
                unreadable = _decode_all(what, names, read, form, aside / "images.npy")
                (aside / "unreadable.json").write_text(json.dumps(unreadable))
                aside.rename(place)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    unreadable = {int(index): reason for index, reason in json.loads((place / "unreadable.json").read_text()).items()}
    if unreadable and not skip:
        raise _refusal(what, names, unreadable)
    kept = np.array([index for index in range(len(names)) if index not in unreadable])
    return np.load(place / "images.npy", mmap_mode="r"), kept


def cache_directory() -> Path:
    """Where decoded images are kept: $FEDRAY_CACHE, else fedray in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDRAY_CACHE") or Path(home) / "fedray")


def _decode_all(
    what: str, names: Sequence[str], read: Callable[[int], Path | bytes], form: Form, path: Path
) -> dict[int, str]:
    """Decode in parallel into `path`; returns why some could not be."""
    shape = (len(names), form.channels, form.resolution, form.resolution)
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    unreadable: dict[int, str] = {}

    def some(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(names))):
            try:
                images[index] = decode(read(index), form)
            except Exception as error:  # Pillow has no common error for damaged images
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                unreadable[index] = "not an image" if "cannot identify" in reason else reason

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without Python's lock
        starts = range(0, len(names), CHUNK)
        done = threads.map(some, starts)
        for _ in track(done, f"decoding {what}", len(starts), console=Console(stderr=True), transient=True):
            pass
    if len(unreadable) == len(names):
        raise _refusal(what, names, unreadable)
    if unreadable:
        kept = [index for index in range(len(names)) if index not in unreadable]
        for row, index in enumerate(kept):  # row ≤ index, so nothing is overwritten before it is moved
            images[row] = images[index]
        whole = path.with_name("whole.npy")
        path.rename(whole)
        compact = np.lib.format.open_memmap(path, "w+", np.uint8, (len(kept), *shape[1:]))
        compact[:] = images[: len(kept)]
        whole.unlink()
        images = compact
    images.flush()
    return dict(sorted(unreadable.items()))


def _refusal(what: str, names: Sequence[str], unreadable: dict[int, str]) -> UserError:
    first = "; ".join(f"{names[index]} ({reason})" for index, reason in list(unreadable.items())[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    return UserError(
        f"{what}: {len(unreadable)} of {len(names)} images cannot be read: {first}{more}. Mend or remove them, or "
        f"leave them out with --skip-unreadable."
    )


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock of one that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{what}: another process has been decoding it for {LOCK_TIMEOUT / 3600:g} hours; end that "
                        f"process, or set FEDRAY_CACHE to another directory."
                    ) from None
                time.sleep(0.2)
        yield
