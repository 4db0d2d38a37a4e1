"""Pictures of a run: grids of samples, strips of prompts, samples beside their nearest training images."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedray.files import durably


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """Make a picture of uint8 images [n, channels, height, width], enlarged to at least 48 pixels, with gaps."""
    from torchvision.utils import make_grid

    scale = max(1, -(-48 // images.shape[-1]))
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(large, nrow=columns, padding=4, pad_value=96).permute(1, 2, 0).numpy())


def draw(directory: Path, name: str, images: np.ndarray, rounds: int, columns: int = 8) -> None:
    """Save a grid of images as NAME/round-….png, and the latest as NAME.png."""
    (directory / name).mkdir(exist_ok=True)
    picture = grid(torch.from_numpy(images), columns)
    for path in (directory / name / f"round-{rounds:06d}.png", directory / f"{name}.png"):
        _save(picture, path)


def draw_nearest(directory: Path, images: np.ndarray, nearest: np.ndarray, rounds: int) -> None:
    """Save the first 32 images, 8 in a row, each with its nearest training image below it."""
    draw(directory, "nearest", _pairs(images, nearest), rounds)


def draw_audit(path: Path, images: np.ndarray, nearest: np.ndarray) -> None:
    """Save the same picture of an audit's samples."""
    _save(grid(torch.from_numpy(_pairs(images, nearest))), path)


def _pairs(images: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    pairs = np.stack([images[:32], nearest[:32]])
    blocks = [pairs[:, start : start + 8] for start in range(0, pairs.shape[1], 8)]
    return np.concatenate([row for block in blocks for row in block])


def draw_prompts(directory: Path, images: np.ndarray, prompts: Sequence[str], rounds: int, final: bool) -> None:
    """Save a strip of the prompts' images as validation/round-….png, and all strips, by prompt, as validation.png.

    images: uint8 [n, c, h, w], image i for prompt i modulo their number.
    """
    place = directory / "validation"
    place.mkdir(exist_ok=True)
    by_prompt = images.reshape(-1, len(prompts), *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
    _save(grid(torch.from_numpy(by_prompt), columns=len(images)), place / f"round-{rounds:06d}.png")
    strips = sorted(place.glob("round-*.png"))
    if len(strips) > 6:  # the base, the last, and some between
        strips = [strips[index] for index in np.linspace(0, len(strips) - 1, 6).round().astype(int)]
    from matplotlib.figure import Figure

    shown = labels_of(prompts, 14 * len(images) // len(prompts))
    lines = max(label.count("\n") + 1 for label in shown)
    figure = Figure(figsize=(1.2 * len(images), 1.4 * len(strips) + 0.3 + 0.11 * lines), layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, strip in zip(axes, strips, strict=True):
        number = int(strip.stem.removeprefix("round-"))
        axis.imshow(np.asarray(Image.open(strip)))
        width = axis.get_xlim()[1] / len(prompts)
        axis.set_xticks(
            [(index + 0.5) * width for index in range(len(prompts))],
            shown if axis is axes[0] else [],
        )
        axis.xaxis.tick_top()
        axis.set_yticks([])
        axis.set_ylabel("base" if number == 0 else "final" if final and number == rounds else f"round {number}")
        axis.tick_params(length=0, labelsize=7)
    with durably(directory / "validation.png") as aside:
        figure.savefig(aside, dpi=110, format="png")


def labels_of(prompts: Sequence[str], width: int) -> list[str]:
    """Wrap prompts to at most six lines of so many characters; of longer ones that begin alike, show where they end."""
    labels = ["\n".join(textwrap.wrap(prompt, width, max_lines=6, placeholder=" …")) for prompt in prompts]
    if len(set(labels)) < len(set(prompts)):
        labels = ["… " + "\n".join(textwrap.wrap(prompt, width)[-5:]) for prompt in prompts]
    return labels


def keep_samples(directory: Path, images: np.ndarray, rounds: int) -> None:
    """Save every image as samples/round-…/00000.png and so on."""
    place = directory / "samples" / f"round-{rounds:06d}"
    place.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        path = place / f"{index:05d}.png"
        path.unlink(missing_ok=True)  # a link would be followed
        Image.fromarray(pixels).save(path)


def _save(picture: Image.Image, path: Path) -> None:
    with durably(path) as aside:
        picture.save(aside, format="PNG")
