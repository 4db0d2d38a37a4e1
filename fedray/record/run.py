"""A run's directory: its configuration, a row per round, and everything that a resumed run needs.

config.json     the configuration, versions and git commit
rounds.jsonl    a row per complete round, up to the last checkpoint
result.json     the final model's SHA-256, totals and scores
privacy.jsonl   with noise, a line before each is drawn; with that of clients, example-privacy.jsonl
partition.csv   which client holds what; drawn as partition.png
tensorboard/    the numbers of the rows, as event files
checkpoints/    the last complete round: round-000020.safetensors (the server's state: "model", "ema/model" …)
clients/        what clients keep between rounds (optimizers, what algorithms and links remember), by rounds complete
samples/        a grid per evaluation; the last one also as samples.png
validation/     samples for each prompt after some rounds, from the same noise; side by side as validation.png
nearest/        samples with their nearest training images below them, where some images were held out: nearest.png
model/          what diffusers loads
.lock           held by the process that writes the run
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from fedray.config import FORMAT, Config
from fedray.errors import RunError, UserError, reason
from fedray.files import as_json, is_content, read_json, read_text, size, write
from fedray.lazy import torch
from fedray.record.checkpoint import State, load_rows, load_state, save_state
from fedray.record.copies import local, strangers
from fedray.record.lock import hold, unwritable
from fedray.record.publishing import Writer, published
from fedray.record.upgrade import upgrade
from fedray.storage import located, shown, url_of
from fedray.vector import Layout, load_checked, save

Row = dict[str, Any]  # a line of rounds.jsonl

SPARE = 1_000_000  # bytes beside a checkpoint's tensors: rows, pictures
PATIENCE = 10.0  # seconds to wait for another process that writes a run

# Of a sweep: how its record's name ends; and, in the directory of a run that is not complete, a line that says why.
RECORD = ".sweep.json"
FAILED = "failed.txt"
STOPPED = "stopped.txt"


class Run:
    """A run directory, to read from and, by the run itself, to write to; of a run at a URL, its copy on this node."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = located(directory)
        self._writer: Writer | None = None  # of a run at a URL, while it is written
        self.gone_back = ""  # why `state` is not that of the last checkpoint

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open an existing run, at a path or a URL. Raises `UserError` where there is none."""
        run = cls(local(directory, whole=True))
        if not run.directory.is_dir():
            raise UserError(f"there is no run at {run}: the directory does not exist.")
        if not (run.directory / "config.json").is_file():
            raise UserError(f"there is no run at {run}: it has no config.json.")
        return run

    def __str__(self) -> str:
        return shown(self.directory)

    # Reading

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The contents of config.json: "config", in today's names, and the versions that it ran with."""
        saved = read_json(self.directory / "config.json")
        try:
            return saved | {"config": upgrade(saved["config"])}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.directory / 'config.json'} is damaged: it lacks {error}.") from None

    @property
    def config(self) -> Config:
        """The run's configuration, where all of it is fedray's own; else `config_with`."""
        return self.config_with(())

    def config_with(self, allowed: Collection[Path]) -> Config:
        """Return the run's configuration. What it names of the user's own files runs only where they are `allowed`."""
        try:
            return Config.from_json(self.saved["config"], allowed)
        except KeyError as error:
            raise UserError(f"{self.directory / 'config.json'} is damaged: it lacks {error}.") from None
        except (TypeError, ValueError, AttributeError) as error:  # a value of another kind
            raise UserError(f"{self.directory / 'config.json'} is damaged: {reason(error)}.") from error

    @property
    def rows(self) -> list[Row]:
        """One row per complete round."""
        path = self.directory / "rounds.jsonl"
        # A last line that a kill cut short is in the checkpoint: `recover`.
        lines = read_text(path).split("\n")[:-1] if path.exists() else []
        return [_row(path, number, line) for number, line in enumerate(lines, 1)]

    def complete_after(self, rounds: int) -> bool:
        """Tell whether the run is complete, with that many rounds."""
        return self.result is not None and self.result["rounds"] == rounds

    @property
    def result(self) -> Row | None:
        """Totals and scores; None while the run is not complete."""
        path = self.directory / "result.json"
        return read_json(path, "; remove it, and --resume writes it anew") if path.exists() else None

    def checkpoint(self) -> Path | None:
        """Return the path of the last complete round's checkpoint; None before the first."""
        return max(self.directory.glob("checkpoints/round-*.safetensors"), default=None)

    @property
    def complete_rounds(self) -> int:
        """Complete rounds, by the last checkpoint."""
        path = self.checkpoint()
        return 0 if path is None else int(path.stem.removeprefix("round-"))

    def state(self, layout: Layout, memories: bool = False) -> State | None:
        """Return the state after the last complete round; None before the first.

        Where that checkpoint is damaged, it is that of the one before, if there is one; `gone_back` says so.

        Args:
            memories: whether what clients remember must be undamaged too.

        Raises:
            UserError: no checkpoint is whole.
        """
        paths, damage = sorted(self.directory.glob("checkpoints/round-*.safetensors"), reverse=True), None
        for path in paths:
            try:
                state = load_state(path, layout)
                if memories:
                    for client in self._remembered():
                        self.recall(client, self.generation(client, state.round))
            except UserError as error:
                damage = damage or error
                continue
            if damage is not None:
                self.gone_back = f"{damage} Gone back to the checkpoint after round {state.round}."
            return state
        if damage is not None:
            raise damage
        return None

    # Writing

    def create(self, config: Config, data: dict[str, str], provenance: dict[str, Any]) -> None:
        """Begin a run here. Raises `UserError` if the directory holds anything, or cannot be written.

        Of two processes that begin one at the same time, the other finds the first one's.
        """
        self.check_vacant()
        # The id is what trackers know the run by, wherever its directory is moved to.
        text = as_json({"format": FORMAT, "id": uuid4().hex[:12], "config": config.to_json(), **data, **provenance})
        with self.locked():
            self.check_vacant()
            try:
                write(self.directory / "config.json", text)
            except OSError as error:
                raise unwritable(self.directory, error) from None

    def check_data(self, data: dict[str, str]) -> None:
        """Raise `UserError` if what a `Plan` found is not what the run began with."""
        if any(self.saved.get(name, value) != value for name, value in data.items()):
            raise UserError(
                f"the images of the run at {self}, their labels or captions, the base it fine-tunes, what it started "
                f"from, or what scores compare them by, have changed since it began; its rounds belong to them as they "
                f"were: put them back, or begin another run."
            )

    def check_vacant(self) -> None:
        """Raise `UserError` if a run cannot begin here."""
        place = self.directory
        if "working_dir_files" in place.absolute().parts:  # of `ray job submit --working-dir`
            raise UserError(
                f"{place.absolute()} is in Ray's copy of a working directory, which is removed after the job; give an "
                f"absolute --out."
            )
        occupied = place.exists() and (not place.is_dir() or any(map(is_content, place.iterdir())))
        # Asked second: of two that begin, the other may write its configuration meanwhile.
        if (place / "config.json").exists():
            raise UserError(
                f"{self} holds another run; choose another --out, or continue that run with --resume {self}."
            )
        if occupied or strangers(place):
            raise UserError(f"{self} exists and is not an empty directory; choose another --out.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, and what is published of it: two processes must not write the same run."""
        with hold(self.directory, PATIENCE), published(self.directory) as self._writer:
            try:
                yield
            finally:
                self._writer = None

    def complete(self, state: State, rows: Iterable[Row], layout: Layout, limit: int) -> None:
        """Save complete rounds: they count the moment the checkpoint of the last is renamed. Keep `limit` checkpoints.

        The rows travel in the checkpoint, so that a run killed before `append` still has them.

        Raises:
            RunError: the disk has too little space left.
        """
        directory = self.directory / "checkpoints"
        directory.mkdir(exist_ok=True)
        need = sum(tensor.nbytes for tensor in state.tensors.values()) + SPARE
        if need > (free := shutil.disk_usage(directory).free):
            raise RunError(
                f"the checkpoint of round {state.round} needs {size(need)} on the disk of {self}, and "
                f"{size(free)} are free; the run keeps its last checkpoint."
            )
        save_state(directory / f"round-{state.round:06d}.safetensors", state, layout, rows)
        self.prune(state.round, rows, limit)
        self.publish()

    def publish(self) -> None:
        """Write what is new where the run is published: that is durable when this returns. Raises `RunError`."""
        if self._writer is not None:
            self._writer.publish()

    def prune(self, rounds: int, rows: Iterable[Row], limit: int) -> None:
        """Remove all but the last `limit` checkpoints, and memories of the rows' clients that none of them needs."""
        paths = sorted(self.directory.glob("checkpoints/round-*.safetensors"))
        for path in paths[:-limit]:
            path.unlink()
        clients = {client for row in rows for client in row["cohort"]}
        if len(paths) > 1 and limit > 1:  # also of clients that were in the cohorts before
            rounds = int(paths[-limit:][0].stem.removeprefix("round-"))
            clients = set(self._remembered())
        for client in clients:
            last = self.generation(client, rounds)
            for path in self._memory(client).glob("*.safetensors"):
                if last is not None and int(path.stem) < last:
                    path.unlink()

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows to rounds.jsonl."""
        with open(self.directory / "rounds.jsonl", "a", opener=_unlinked) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())  # the next checkpoint replaces the one that holds these rows
        self.publish()

    def recover(self, rounds: int) -> list[Row]:
        """Make rows and client memories those of the last checkpoint, `rounds` complete rounds.

        Returns the rows up to that round that are not in rounds.jsonl yet.
        """
        path = self.directory / "rounds.jsonl"
        if path.exists():
            # A line that a kill cut short is the last one, and its row is in the checkpoint.
            lines = [line for line in read_text(path).splitlines(keepends=True)[:rounds] if line.endswith("\n")]
            write(path, "".join(lines))
        for damaged in self.directory.glob("checkpoints/round-*.safetensors"):
            if int(damaged.stem.removeprefix("round-")) > rounds:
                damaged.unlink()
        for memory in self.directory.glob("clients/*/*.safetensors"):
            if int(memory.stem) > rounds:
                memory.unlink()
        checkpoint, written = self.checkpoint(), [row["round"] for row in self.rows]
        left = [row for row in load_rows(checkpoint) if row["round"] > len(written)] if checkpoint else []
        if [*written, *(row["round"] for row in left)] != list(range(1, rounds + 1)):
            raise UserError(f"{path} does not have a row for each of the {rounds} complete rounds: it is damaged.")
        return left

    def extend(self, rounds: int) -> None:
        """Have a run, complete or not, end after that many rounds."""
        with self.locked():
            saved = read_json(self.directory / "config.json")
            # In this order: one that is killed between is a run without its result, which resuming writes again.
            if not self.complete_after(rounds):
                (self.directory / "result.json").unlink(missing_ok=True)
            if saved["config"]["rounds"] == rounds:
                return
            saved["config"]["rounds"] = rounds
            write(self.directory / "config.json", as_json(saved))

    def remember(self, client: int, generation: int, memory: Mapping[str, torch.Tensor]) -> None:
        """Save a client's memory as of `generation` complete rounds."""
        directory = self._memory(client)
        directory.mkdir(parents=True, exist_ok=True)
        save(directory / f"{generation:06d}.safetensors", memory)

    def generation(self, client: int, rounds: int) -> int | None:
        """Return the latest generation of a client's memory that is not after `rounds` complete rounds, if any."""
        found = (int(path.stem) for path in self._memory(client).glob("*.safetensors"))
        return max((generation for generation in found if generation <= rounds), default=None)

    def recall(self, client: int, generation: int | None) -> dict[str, torch.Tensor]:
        """Return a client's memory of that generation; {} for None. Raises `UserError` if it is damaged."""
        if generation is None:
            return {}
        return load_checked(self._memory(client) / f"{generation:06d}.safetensors")[0]

    def check_disk(self, needed: Mapping[str, int]) -> None:
        """Raise `UserError` if what the run writes, in bytes by what it is, would not fit on the disk."""
        places = ("checkpoints/*", "clients/*/*", "samples/*/*")  # of a run that is resumed
        held = sum(path.stat().st_size for place in places for path in self.directory.glob(place))
        free = shutil.disk_usage(next(p for p in self.directory.absolute().parents if p.exists())).free
        if sum(needed.values()) > free + held:
            parts = ", ".join(f"{what} {size(bytes)}" for what, bytes in needed.items() if bytes)
            other = "choose an --out" if url_of(self.directory) is None else "set FEDRAY_CACHE to a directory"
            raise UserError(
                f"the run needs about {size(sum(needed.values()))} on the disk of {self} ({parts}), and "
                f"{size(free)} are free; {other} on another disk."
            )

    def finish(self, result: Row) -> None:
        """Write the result: then the run is complete."""
        write(self.directory / "result.json", as_json(result))

    def _remembered(self) -> list[int]:
        """The clients that have a memory."""
        return [int(path.name) for path in self.directory.glob("clients/*") if path.name.isdecimal()]

    def _memory(self, client: int) -> Path:
        return self.directory / "clients" / f"{client:06d}"


def _row(path: Path, number: int, line: str) -> Row:
    """Read a line of rounds.jsonl. Raises `UserError`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged at line {number}: {reason(error)}.") from None
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        raise UserError(f"{path} is damaged at line {number}: it is no row of a round.")
    return row


def _unlinked(path: str, flags: int) -> int:
    """Open a file, but not through a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
