"""The command line: fedray train, fedray sample, fedray evaluate."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import tyro

import fedray

USAGE = """fedray simulates federated training of diffusion models on Ray.

  fedray train [--preset digits] [--clients 4] [--rounds 20] …   train, and write a run directory
  fedray train --resume RUN                                      continue a run that was stopped
  fedray sample RUN [--num-images 64] [--out FILE]               draw images from a run's model
  fedray evaluate RUN [--samples 512]                            score a run's model
  fedray --version

Each command has its own --help.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a run that failed, 2 for a mistake, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    if command == "--version":
        print(f"fedray {fedray.__version__}")
        return 0
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    from fedray.choices import RunError, UserError, check_name

    try:
        commands: dict[str, Callable[[list[str]], None]] = {
            "train": train, "sample": sample, "evaluate": evaluate
        }  # fmt: skip
        check_name("command", command, commands)
        commands[command](rest)
    except UserError as error:
        print(f"fedray: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fedray: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a directory that may not be written
        print(f"fedray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def program() -> str:
    """How to type fedray here: by its path, where its environment is not activated."""
    return "fedray" if shutil.which("fedray") else os.path.relpath(Path(sys.executable).with_name("fedray"))


def train(arguments: list[str]) -> None:
    """Parse and run `fedray train`."""
    from fedray.choices import UserError
    from fedray.config import Config, preset
    from fedray.record import Run
    from fedray.tasks.ddpm import DDPM

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="digits")
    first.add_argument("--resume", type=Path)
    known, _ = first.parse_known_args(arguments)
    base = Run.open(known.resume).config if known.resume else preset(known.preset)
    # Given on the command line, local steps replace the base's local epochs, and the other way round.
    blank = replace(base, local_epochs=None, local_steps=None)

    @dataclass(frozen=True)
    class Train:
        """Train a model by federated averaging, and write a run directory."""

        preset: str = "digits"
        """Settings to start from: digits, or celeba (the paper's)."""
        out: Path | None = None
        """Directory of the run; by default runs/PRESET-DATE-TIME."""
        resume: Path | None = None
        """Continue the run in this directory; only settings of placement may be given with it."""
        local_only: bool = False
        """Train every client alone, without a federation: what the others are worth. A run per client."""
        dry_run: bool = False
        """Print what would be done (clients, examples, steps, bytes) and train nothing."""
        task: tyro.conf.OmitArgPrefixes[DDPM] = cast(DDPM, base.task)
        config: tyro.conf.OmitArgPrefixes[Config] = blank

    asked = tyro.cli(Train, args=arguments, prog="fedray train")
    config = replace(asked.config, task=asked.task)
    if config.local_epochs is None and config.local_steps is None:
        config = replace(config, local_epochs=base.local_epochs, local_steps=base.local_steps)
    if asked.resume and asked.out:
        raise UserError("--out and --resume are both given; a resumed run stays in its directory.")
    if asked.resume and any(argument.split("=")[0] == "--preset" for argument in arguments):
        raise UserError("--preset and --resume are both given; a resumed run keeps its settings.")
    if asked.dry_run:
        _print_plan(config)
        return
    from fedray.actors import run, run_local_only

    if asked.local_only and asked.resume:
        raise UserError("--local-only and --resume are both given; repeat the command with the same --out to go on.")
    out = asked.resume or asked.out or Path("runs") / time.strftime(f"{asked.preset}-%Y%m%d-%H%M%S")
    config.check()
    config.task.dataset()  # decoding shows progress of its own
    if asked.local_only:
        with progress(config.rounds) as (on_row, show):
            runs = run_local_only(config, out, on_row=on_row, show=show)
        print_table({run.directory.name: run.directory for run in runs}, mean=True)
        print(f"runs      {out}")
        return
    with progress(config.rounds) as (on_row, show):
        try:
            finished = run(config, out, resume=asked.resume is not None, on_row=on_row, show=show)
        except (KeyboardInterrupt, fedray.RunError):
            if (out / "config.json").exists():
                print(f"\nContinue this run with: {program()} train --resume {out}", file=sys.stderr)
            raise
    print_table({str(out): finished.directory})
    if config.evaluate_samples:
        print(f"samples   {out / 'samples.png'}")
    print(f"run       {out}\nnext      {program()} sample {out} --num-images 100 --seed 1")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What `fedray sample` and `fedray evaluate` have in common."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    seed: int = 0
    """Seed of the noise that the images start from."""
    sampler: str | None = None
    """ddpm, ddim, dpmsolver++ or unipc; by default the run's."""
    sampling_steps: int | None = None
    """Denoising steps; by default the run's."""
    actors: int | None = 0
    """Client actors that draw; 0 draws in this process, None takes as many as fit."""
    cpus_per_actor: float = 1.0
    """CPUs of an actor."""
    gpus_per_actor: float = 0.0
    """GPUs of an actor; 0 computes on CPUs."""
    address: str | None = None
    """A running Ray cluster to join (auto, or HOST:PORT)."""


def sample(arguments: list[str]) -> None:
    """Parse and run `fedray sample`."""
    import torch

    from fedray.choices import UserError
    from fedray.record import grid

    @dataclass(frozen=True)
    class Sample(Draw):
        """Draw images from a run's model, into one picture."""

        num_images: int = 64
        """How many images to draw."""
        out: Path | None = None
        """File of the picture; by default RUN/samples/sample-seedS.png."""

    asked = tyro.cli(Sample, args=arguments, prog="fedray sample")
    if asked.num_images < 1:
        raise UserError(f"--num-images {asked.num_images}: it must be above 0.")
    out = asked.out or asked.run / "samples" / f"sample-seed{asked.seed}.png"
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: the name of the picture must end in .png, .jpg or .webp.")
    images, _ = _draw(asked, asked.num_images)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.from_numpy(images)).save(out)
    print(f"samples   {out}")


def evaluate(arguments: list[str]) -> None:
    """Parse and run `fedray evaluate`."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fedray.choices import UserError
    from fedray.federation import score
    from fedray.record import Run

    @dataclass(frozen=True)
    class Evaluate(Draw):
        """Score a run's model on newly drawn samples."""

        samples: int | None = None
        """How many images to draw and score; by default as many as the run did."""

    asked = tyro.cli(Evaluate, args=arguments, prog="fedray evaluate")
    if asked.samples is not None and asked.samples < 2:
        raise UserError(f"--samples {asked.samples}: a score needs at least 2.")
    if Run.open(asked.run).config.features is None:
        raise UserError(f"the run at {asked.run} names no features (--features) to be scored on.")
    images, config = _draw(asked, asked.samples)
    print(f"{asked.run}: {len(images)} samples, {config.sampler}-{config.sampling_steps}")
    table = Table("score", "value")
    for name, value in score(images, config).items():
        table.add_row(escape(name), f"{value:.4g}")
    Console().print(table)


def _draw(asked: Draw, n: int | None) -> tuple[Any, Any]:
    """n images (by default as many as the run evaluated) of a run's last checkpoint, and the settings used."""
    import torch

    from fedray.actors import open_pool
    from fedray.choices import UserError
    from fedray.client import build
    from fedray.federation import sample
    from fedray.record import Run

    directory = asked.run
    run = Run.open(directory)
    config = run.config
    config = replace(
        config,
        sampler=asked.sampler or config.sampler,
        sampling_steps=config.sampling_steps if asked.sampling_steps is None else asked.sampling_steps,
        actors=asked.actors,
        cpus_per_actor=asked.cpus_per_actor,
        gpus_per_actor=asked.gpus_per_actor,
        address=asked.address,
    )
    config.check()
    n = config.evaluate_samples if n is None else n
    if n < 1:
        raise UserError(f"the run at {directory} was not evaluated; say how many samples (--samples).")
    state = run.state(build(config, torch.device("cpu")).flat.layout)
    if state is None:
        raise UserError(f"the run at {directory} has no complete round yet.")
    with open_pool(config) as pool, progress(config.rounds) as (_, show):
        return sample(pool, state.vector if state.ema is None else state.ema, n, config, asked.seed, show), config


def _print_plan(config: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedray.federation import make_plan, steps_planned

    plan = make_plan(config)
    steps = steps_planned(config, plan)
    sizes = plan.shards.sizes
    actors = {None: "as many as fit", 0: "none (this process)"}.get(config.actors, config.actors)
    table = Table("what", "value", title="dry run: nothing is trained")
    for name, value in {
        "clients": f"{config.clients}, of which {config.cohort_size} take part in a round",
        "examples": f"{sizes.sum():,} in all; per client {sizes.min():,} to {sizes.max():,}",
        "rounds": f"{config.rounds}",
        "actors": f"{actors}, {config.cpus_per_actor:g} CPUs and {config.gpus_per_actor:g} GPUs each",
        "parameters": f"{plan.layout.size:,}",
        "steps": f"{sum(map(sum, steps)):,} in all; {sum(map(max, steps)):,} one after the other",
        "bytes": f"{plan.payload:,} per client, round and direction",
        "bytes in all": f"{plan.payload * sum(map(len, steps)) / 1e6:,.1f} MB down and as many up",
    }.items():
        table.add_row(name, value)
    Console().print(table)
    if config.clients <= 32:
        clients = Table("client", "examples", "steps a round")
        for client, size in enumerate(sizes):
            clients.add_row(str(client), f"{size:,}", f"{config.steps(int(size)):,}")
        Console().print(clients)


def print_table(runs: dict[str, Path], mean: bool = False) -> None:
    """Print complete runs side by side; with `mean`, a row per run and their mean."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fedray.results import summary

    frame = summary(runs)
    if mean:
        frame.loc["mean"] = frame.mean()
    else:
        frame = frame.T
    table = Table("", *map(escape, frame.columns))
    for name, values in frame.iterrows():
        cells = (f"{value:,.0f}" if value == round(value) else f"{value:,.4g}" for value in values)
        table.add_row(escape(str(name)), *cells)
    Console().print(table)


@contextmanager
def progress(rounds: int) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str, float, float], None]]]:
    """A progress bar with the time left, and a line per round: what `run` takes as `on_row` and `show`."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        current = bar.add_task("starting", total=None)
        phase = "starting"

        def show(now: str, done: float, total: float) -> None:
            nonlocal current, phase
            if now != phase:
                bar.remove_task(current)
                current, phase = bar.add_task(now, total=total), now
            bar.update(current, completed=done)

        def on_row(row: dict[str, Any]) -> None:
            failed = [client for client in row["clients"] if client["outcome"] != "ok"]
            bar.console.print(
                f"round {row['round']}/{rounds}  loss {row['loss']:.4f}  {row['seconds']['round']:.1f} s  "
                f"{(row['bytes_down'] + row['bytes_up']) / 1e6:.1f} MB",
                *(f"\n  client {client['client']} left out: {client['outcome']}" for client in failed),
                *(f"{name} {value:.3g}" for name, value in row["scores"].items()),
                highlight=False,
                markup=False,
            )

        yield on_row, show
