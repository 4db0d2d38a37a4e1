"""How fast are photos decoded? 10,000 JPEG photos of 256x256 pixels, generated, as 64x64.

    python experiments/bench/images.py

fedray decodes a folder into a new cache, on a thread for each core: turned upright, the central square, bicubic; with
the SHA-256 of all images, the seal of the cache's entry, labels and columns. Against it a loop on one core with the
same operations of Pillow, into an array in memory; and Hugging Face `datasets` (imagefolder, then a batched map on a
process for each core, into its own new cache; no downloads). Each is a new process, without its imports. All three must
make the same pixels. Per core: divided by the threads or processes that decode.
"""

import hashlib
import importlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from measure import spread, table
from PIL import Image, ImageOps

CORES = os.cpu_count() or 1
SIDE = 64


def generate(folder: Path, n: int) -> None:
    """Write n different photos of 256x256 pixels: smooth colours with noise, as JPEG of quality 90."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 8, (512, 512, 3))
    for index in range(n):
        smooth = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
        top, left = rng.integers(0, 256, 2)
        pixels = np.asarray(smooth) + noise[top : top + 256, left : left + 256]
        path = folder / f"{index % 10}" / f"{index:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def pixels_of(image: Image.Image) -> np.ndarray:
    """Do to an opened image what fedray does: uint8 [64, 64, 3]."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def by_pillow(photos: Path, place: Path) -> np.ndarray:
    paths = sorted(photos.rglob("*.jpg"))
    images = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for row, path in enumerate(paths):
        with Image.open(path) as opened:
            images[row] = pixels_of(opened)
    return images.transpose(0, 3, 1, 2)


def by_fedray(photos: Path, place: Path) -> np.ndarray:
    from fedray.data.images import Form
    from fedray.data.sources import image_folder

    os.environ["FEDRAY_CACHE"] = str(place)
    return image_folder(photos, Form(SIDE, 3)).images


def by_datasets(photos: Path, place: Path) -> Any:
    from datasets import Array3D, ClassLabel, Features, load_dataset

    def resized(batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": [pixels_of(image) for image in batch["image"]], "label": batch["label"]}

    found = load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(place))
    labels = ClassLabel(names=found.features["label"].names)
    features = Features({"pixels": Array3D((SIDE, SIDE, 3), "uint8"), "label": labels})
    return found.map(
        resized, batched=True, batch_size=100, num_proc=CORES, remove_columns=["image"], features=features
    ).with_format("numpy")  # fmt: skip


SIDES: dict[str, tuple[Callable[[Path, Path], Any], int]] = {
    "Pillow, a loop": (by_pillow, 1),
    "fedray": (by_fedray, CORES),
    "datasets": (by_datasets, CORES),
}


def decode(name: str, photos: Path, place: Path, answer: Any) -> None:
    """In a process of its own: put the seconds that one side takes, and the SHA-256 of its pixels."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for module in ("datasets", "fedray.data.sources"):  # what a side imports is not timed
        importlib.import_module(module)
    started = time.perf_counter()
    images = SIDES[name][0](photos, place)
    seconds = time.perf_counter() - started
    if name == "datasets":
        pixels = [batch["pixels"].astype(np.uint8) for batch in images.iter(1000)]
        images = np.concatenate(pixels).transpose(0, 3, 1, 2)
    answer.put((seconds, len(images), hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()))


def main(n: int = 10_000, repeats: int = 3) -> None:
    """Measure.

    Args:
        n: photos.
        repeats: how often each is measured, in turns.
    """
    spawn = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    made = set()
    with tempfile.TemporaryDirectory() as directory:
        photos = Path(directory) / "photos"
        photos.mkdir()
        generate(photos, n)
        for _ in range(repeats):
            for name in SIDES:
                place = Path(directory) / "cache"
                answer = spawn.Queue()
                process = spawn.Process(target=decode, args=(name, photos, place, answer))
                process.start()
                seconds, count, digest = answer.get(timeout=3600)
                process.join()
                shutil.rmtree(place, ignore_errors=True)
                assert count == n
                made.add(digest)
                rates[name].append(n / seconds)
    assert len(made) == 1, "they make different pixels"
    rows = []
    for name, found in rates.items():
        cores = SIDES[name][1]
        per_core = [rate / cores for rate in found]
        ratios = [ours / theirs for ours, theirs in zip(per_core, rates["Pillow, a loop"], strict=True)]
        rows.append([f"{name}, {cores} core{'s' * (cores > 1)}", spread(found), spread(per_core), spread(ratios)])
    table([f"{n:,} photos", "images a second", "a second and core", "÷ Pillow's loop"], rows)


if __name__ == "__main__":
    tyro.cli(main)
