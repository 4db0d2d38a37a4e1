"""A run's directory: what was asked, what happened round by round, and everything that a resumed run needs.

config.json     the configuration, versions and git commit
rounds.jsonl    a row per complete round
result.json     the final model's SHA-256, totals and scores
partition.csv   who holds what, and a picture of it: partition.png
tensorboard/    the numbers of the rows, as event files
checkpoints/    the last complete round: round-000020.safetensors (the vector, and its average as ema.*)
clients/        what clients keep between rounds (kept optimizers)
samples/        a grid per evaluation; the last one also as samples.png
validation/     samples for each prompt after some rounds, from the same noise; side by side as validation.png
nearest/        samples with their nearest training images below them, where some images were held out: nearest.png
model/          what diffusers loads
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from torch import Tensor
from torchvision.utils import make_grid

from fedray import vector
from fedray.algorithms.rules import ServerState
from fedray.config import Config
from fedray.errors import UserError
from fedray.files import as_json, read_json, write
from fedray.record.card import model_card
from fedray.vector import Layout

Row = dict[str, Any]  # a line of rounds.jsonl
Memory = dict[str, np.ndarray]  # what a client keeps from round to round

PATIENCE = 10.0  # seconds to wait for another process that writes a run

# Of a sweep: how its record's name ends; and, in the directory of a run that is not complete, a line that says why.
RECORD = ".sweep.json"
FAILED = "failed.txt"
STOPPED = "stopped.txt"


class Run:
    """A run directory, to read from and, by the run itself, to write to."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @classmethod
    def open(cls, directory: str | Path) -> "Run":
        """An existing run. Raises `UserError` where there is none."""
        run = cls(directory)
        if not run.directory.is_dir():
            raise UserError(f"there is no run at {directory}: the directory does not exist.")
        if not (run.directory / "config.json").is_file():
            raise UserError(f"there is no run at {directory}: it has no config.json.")
        return run

    # Reading

    @cached_property
    def saved(self) -> dict[str, Any]:
        """config.json: "config" and the versions that it ran with."""
        return read_json(self.directory / "config.json")

    @property
    def config(self) -> Config:
        """The run's configuration (fedray's own tasks only)."""
        try:
            return Config.from_json(self.saved["config"])
        except KeyError as error:
            raise UserError(f"{self.directory / 'config.json'} is damaged: it lacks {error}.") from None

    @property
    def rows(self) -> list[Row]:
        """One row per complete round."""
        path = self.directory / "rounds.jsonl"
        # A last line that a kill cut short is in the checkpoint: `recover`.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged at line {error.lineno}: {error.msg}.") from None

    @property
    def result(self) -> Row | None:
        """Totals and scores; None while the run is not complete."""
        path = self.directory / "result.json"
        return read_json(path) if path.exists() else None

    def checkpoint(self) -> Path | None:
        """The checkpoint of the last complete round."""
        return max(self.directory.glob("checkpoints/round-*.safetensors"), default=None)

    def state(self, layout: Layout) -> ServerState | None:
        """The state after the last complete round; None before the first. Raises `UserError`."""
        path = self.checkpoint()
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                base = file.get_tensor("base") if "base" in file.keys() else None  # noqa: SIM118
            ema = vector.load(path, layout, "ema.") if metadata["ema"] == "True" else None
            return ServerState(int(metadata["round"]), vector.load(path, layout), ema, base)
        except ValueError as error:
            raise UserError(str(error)) from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}.") from None

    # Writing

    def create(self, config: Config, data: dict[str, str], provenance: dict[str, Any]) -> None:
        """Begin a run here. Raises `UserError` if the directory holds anything, or cannot be written."""
        self.check_vacant()
        text = as_json({"config": config.to_json(), **data, **provenance})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write(self.directory / "config.json", text)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written: {error.strerror}; choose another --out.") from None

    def check_data(self, data: dict[str, str]) -> None:
        """Raise `UserError` if what a `Plan` found is not what the run began with."""
        if any(self.saved.get(name, value) != value for name, value in data.items()):
            raise UserError(
                f"the images of the run at {self.directory}, their labels or captions, the base it fine-tunes, or what "
                f"scores compare them by, have changed since it began; its rounds belong to them as they were: put "
                f"them back, or begin another run."
            )

    def check_vacant(self) -> None:
        """Raise `UserError` if a run cannot begin here."""
        if (self.directory / "config.json").exists():
            raise UserError(
                f"{self.directory} holds another run; choose another --out, or continue that run with "
                f"--resume {self.directory}."
            )
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise UserError(f"{self.directory} exists and is not an empty directory; choose another --out.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: two processes must not write the same run. One that was just killed may need a moment."""
        deadline = time.monotonic() + PATIENCE
        with open(self.directory / "config.json") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(f"{self.directory} is being written by another process; wait for it.") from None
                time.sleep(0.1)
            yield

    def complete(self, state: ServerState, row: Row, layout: Layout, limit: int) -> None:
        """Save a complete round: the moment its checkpoint is renamed, the round counts. Keeps the last `limit`.

        The row travels in the checkpoint, so that a run killed before `append` still has it.
        """
        directory = self.directory / "checkpoints"
        directory.mkdir(exist_ok=True)
        tensors = layout.views(state.vector)
        if state.ema is not None:
            tensors |= {f"ema.{name}": view for name, view in layout.views(state.ema).items()}
        if state.base is not None:
            tensors["base"] = state.base
        metadata = {"round": str(state.round), "ema": str(state.ema is not None), "row": json.dumps(row)}
        vector.save(directory / f"round-{state.round:06d}.safetensors", tensors, metadata)
        for path in sorted(directory.glob("round-*.safetensors"))[:-limit]:
            path.unlink()
        for client in row["cohort"]:
            for path in sorted(self._memory(client).glob("*.safetensors"))[:-1]:
                path.unlink()

    def append(self, row: Row) -> None:
        with open(self.directory / "rounds.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the next checkpoint replaces the one that holds this row

    def recover(self, rounds: int) -> Row | None:
        """Make rows and client memories those of the last checkpoint, `rounds` complete rounds.

        Returns the row of that round if it is not in rounds.jsonl yet.
        """
        path = self.directory / "rounds.jsonl"
        if path.exists():
            # A line that a kill cut short is the last one, and its row is in the checkpoint.
            lines = [line for line in path.read_text().splitlines(keepends=True)[:rounds] if line.endswith("\n")]
            aside = path.with_suffix(".aside")
            aside.write_text("".join(lines))
            aside.replace(path)
        for memory in self.directory.glob("clients/*/*.safetensors"):
            if int(memory.stem) > rounds:
                memory.unlink()
        checkpoint, written = self.checkpoint(), [row["round"] for row in self.rows]
        if written != list(range(1, rounds + 1))[: len(written)] or len(written) < rounds - 1:
            raise UserError(f"{path} does not have a row for each of the {rounds} complete rounds: it is damaged.")
        if checkpoint is None or len(written) == rounds:
            return None
        with safe_open(checkpoint, framework="pt") as file:
            return json.loads(file.metadata()["row"])

    def remember(self, client: int, rounds: int, memory: Memory) -> None:
        """Save what a client keeps, as of `rounds` complete rounds."""
        directory = self._memory(client)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in memory.items()}
        vector.save(directory / f"{rounds:06d}.safetensors", tensors)

    def recall(self, client: int) -> Memory | None:
        """What a client kept in the last round that it completed; None if it never did."""
        path = max(self._memory(client).glob("*.safetensors"), default=None)
        return None if path is None else load_file(path)

    def check_disk(self, config: Config, layout: Layout) -> None:
        """Raise `UserError` if kept optimizers (two vectors a client) would not fit on the disk."""
        # Twice the cohort's: a round's memories are written before the previous ones are removed.
        need = 2 * 4 * layout.size * (config.clients + config.cohort_size) if config.keep_optimizer else 0
        held = sum(path.stat().st_size for path in self.directory.glob("clients/*/*"))  # by a run that is resumed
        free = shutil.disk_usage(next(p for p in self.directory.absolute().parents if p.exists())).free
        if need > free + held:
            raise UserError(
                f"--keep-optimizer needs {need / 1e9:.1f} GB on the disk of {self.directory} for "
                f"{config.clients} clients, and {free / 1e9:.1f} GB are free."
            )

    def write_card(self, config: Config, result: Row) -> None:
        """model/README.md: what the model was made of and how, for those who get it without the run."""
        (self.directory / "model/README.md").write_text(model_card(config, result, self.saved.get("command", [])))

    def finish(self, result: Row) -> None:
        write(self.directory / "result.json", as_json(result))

    def draw(self, name: str, images: np.ndarray, rounds: int, columns: int = 8) -> None:
        """Save a grid of images as NAME/round-….png, and the latest as NAME.png."""
        (self.directory / name).mkdir(exist_ok=True)
        picture = grid(torch.from_numpy(images), columns)
        for path in (self.directory / name / f"round-{rounds:06d}.png", self.directory / f"{name}.png"):
            picture.save(path)

    def draw_nearest(self, images: np.ndarray, nearest: np.ndarray, rounds: int) -> None:
        """Save the first 32 images, 8 in a row, each with its nearest training image below it."""
        pairs = np.stack([images[:32], nearest[:32]])
        blocks = [pairs[:, start : start + 8] for start in range(0, pairs.shape[1], 8)]
        self.draw("nearest", np.concatenate([row for block in blocks for row in block]), rounds)

    def draw_prompts(self, images: np.ndarray, prompts: Sequence[str], rounds: int, final: bool) -> None:
        """Save a strip of the prompts' images as validation/round-….png, and all strips, by prompt, as validation.png.

        images: uint8 [n, c, h, w], image i for prompt i modulo their number.
        """
        directory = self.directory / "validation"
        directory.mkdir(exist_ok=True)
        by_prompt = images.reshape(-1, len(prompts), *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
        grid(torch.from_numpy(by_prompt), columns=len(images)).save(directory / f"round-{rounds:06d}.png")
        strips = sorted(directory.glob("round-*.png"))
        if len(strips) > 6:  # the base, the last, and some between
            strips = [strips[index] for index in np.linspace(0, len(strips) - 1, 6).round().astype(int)]
        figure = Figure(figsize=(1.2 * len(images), 1.4 * len(strips) + 0.4), layout="constrained")
        axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
        for axis, strip in zip(axes, strips, strict=True):
            number = int(strip.stem.removeprefix("round-"))
            axis.imshow(np.asarray(Image.open(strip)))
            width = axis.get_xlim()[1] / len(prompts)
            axis.set_xticks(
                [(index + 0.5) * width for index in range(len(prompts))],
                [textwrap.shorten(prompt, 28) for prompt in prompts] if axis is axes[0] else [],
            )
            axis.xaxis.tick_top()
            axis.set_yticks([])
            axis.set_ylabel("base" if number == 0 else "final" if final and number == rounds else f"round {number}")
            axis.tick_params(length=0, labelsize=7)
        figure.savefig(self.directory / "validation.png", dpi=110)

    def keep_samples(self, images: np.ndarray, rounds: int) -> None:
        """Save every image as samples/round-…/00000.png and so on."""
        directory = self.directory / "samples" / f"round-{rounds:06d}"
        directory.mkdir(exist_ok=True)
        for index, image in enumerate(images):
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(directory / f"{index:05d}.png")

    def _memory(self, client: int) -> Path:
        return self.directory / "clients" / f"{client:06d}"


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """A picture of uint8 images [n, channels, height, width], enlarged to at least 48 pixels, with gaps between."""
    scale = max(1, -(-48 // images.shape[-1]))
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return Image.fromarray(make_grid(large, nrow=columns, padding=4, pad_value=96).permute(1, 2, 0).numpy())


def environment() -> dict[str, Any]:
    """What a run ran with: versions, machine, git commit of fedray (None if it is not a checkout), command, time."""
    packages = ("fedray", "torch", "diffusers", "ray", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        ran = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()
