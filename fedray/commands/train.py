"""fedray train and fedray finetune: a federated run, or one run per client."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fedray.commands.push import Hub
from fedray.commands.settings import Settings, T, ask, command_of, preset_help, presets_of
from fedray.commands.terminal import print_table, program, progress
from fedray.config import Config
from fedray.errors import Detached, RunError, UserError, check_name
from fedray.forms import files_named
from fedray.presets import PRESETS
from fedray.privacy import epsilon, release_of
from fedray.record.run import Run
from fedray.record.trackers import DEFAULT, open_trackers
from fedray.tasks.named import task_class


@dataclass(frozen=True, kw_only=True)
class Train(Hub, Settings[T]):
    preset: Annotated[str | None, preset_help("train")]
    out: Path | None = None
    """Directory of the run; by default runs/PRESET-DATE-TIME."""
    resume: Path | None = None
    """Continue the run in this directory; only settings of placement may be given with it."""
    local_only: bool = False
    """Train every client alone, without a federation: what the others are worth. A run per client."""
    task_class: Annotated[str | None, tyro.conf.arg(name="task")] = None
    """A task of your own, FILE.py:CLASS, in place of a preset's: its fields become flags."""
    report_to: tuple[str, ...] = DEFAULT
    """Where the run is shown: tensorboard, wandb, trackio, mlflow, none, or a class of your own, FILE.py:CLASS."""
    push_to_hub: bool = False
    """After the run, push its model to the Hugging Face hub."""
    code: tuple[Path, ...] = ()
    """Files of your own classes that a resumed run names: only those given here, or in another flag, may run."""
    dry_run: bool = False
    """Print what would be done (clients, examples, steps, bytes) and train nothing."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Train[T]):
    preset: Annotated[str | None, preset_help("finetune")]


def main(arguments: list[str]) -> None:
    """Parse and run `fedray train`."""
    _main(arguments, Train, "train", "digits", "Train a model by federated averaging, and write a run directory.")


def finetune(arguments: list[str]) -> None:
    """Parse and run `fedray finetune`."""
    what = "Fine-tune Stable Diffusion by federated LoRA, and write a run directory."
    _main(arguments, Finetune, "finetune", "sd", what)


def plan(arguments: list[str], command: str, rehearse: Callable[[Config, Path], None]) -> None:
    """Parse the arguments of `fedray train` or `fedray finetune`, print what a run would do, and rehearse it."""
    what = "Measure a step, its memory and a batch of samples, and say how long a run would take. Nothing is written."
    flags, preset = (Finetune, "sd") if command == "finetune" else (Train, "digits")
    _main(arguments, flags, command, preset, what, rehearse)


def _base(known: argparse.Namespace, arguments: list[str], command: str) -> Config:
    """Return the settings to start from: a run's, those of a task of the user's own, or a preset's."""
    if known.resume:
        base = Run.open(known.resume).config_with(files_named(arguments))
        if command_of(base) != command:
            raise UserError(f"{known.resume} is a run of `fedray {command_of(base)}`; resume it with that.")
        return base
    if known.task:
        task = task_class(known.task)()
        base = PRESETS[known.preset] if known.preset else Config(local_epochs=1)
        return replace(base, task=task, features=None)
    check_name("preset", known.preset, presets_of(command))
    return PRESETS[known.preset]


def _main(
    arguments: list[str],
    flags: type[Train],
    command: str,
    first_preset: str,
    what: str,
    rehearse: Callable[[Config, Path], None] | None = None,
) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--resume", type=Path)
    first.add_argument("--task")
    known, _ = first.parse_known_args(arguments)
    if not known.task:
        known.preset = known.preset or first_preset
    base = _base(known, arguments, command)
    asked, config = ask(flags, base, arguments, command, what, known.preset)
    if asked.resume and asked.out:
        raise UserError("--out and --resume are both given; a resumed run stays in its directory.")
    if asked.resume and any(argument.split("=")[0] == "--preset" for argument in arguments):
        raise UserError("--preset and --resume are both given; a resumed run keeps its settings.")
    if asked.dry_run or rehearse is not None:
        _print_plan(config)
        if rehearse is not None:
            rehearse(config, asked.out or Path("runs"))
        return
    if asked.local_only and asked.resume:
        raise UserError("--local-only and --resume are both given; repeat the command with the same --out to go on.")
    out = asked.resume or asked.out or Path("runs") / time.strftime(f"{asked.preset or config.task.name}-%Y%m%d-%H%M%S")
    config.check()
    trackers = open_trackers(asked.report_to)
    if asked.push_to_hub:
        asked.check(out)

    from fedray.cluster.alone import run_local_only  # Ray and torch take seconds to import: mistakes are told before
    from fedray.cluster.driver import run
    from fedray.reports.results import summary

    dataset = config.task.dataset()  # decoding shows progress of its own
    if asked.local_only:
        with progress(config.rounds, alone=True) as (on_row, show):
            runs = run_local_only(config, out, on_row=on_row, show=show, dataset=dataset, report_to=trackers)
        directories = {run.directory.name: run.directory for run in runs}
        summary(directories).to_csv(out / "summary.csv", index_label="run")
        print_table(directories, mean=True)
        print(f"table     {out / 'summary.csv'}")
        print(f"runs      {out}")
        return
    resuming = _resuming(command, out, config, arguments, asked.report_to)
    with progress(config.rounds) as (on_row, show):
        try:
            resume = asked.resume is not None
            finished = run(config, out, resume=resume, on_row=on_row, show=show, dataset=dataset, report_to=trackers)
        except Detached:
            print(f"\nThe run goes on on the cluster. Follow it with: {resuming}", file=sys.stderr)
            raise
        except (KeyboardInterrupt, RunError):
            if (out / "config.json").exists():
                print(f"\nContinue this run with: {resuming}", file=sys.stderr)
            raise
    print_table({str(out): finished.directory})
    if config.evaluate_samples:
        print(f"samples   {out / 'samples.png'}")
    if asked.push_to_hub:
        asked.push(finished)
    print(f"run       {out}\nnext      {program()} sample {out} --num-images 100 --seed 1")


def _resuming(command: str, out: Path, config: Config, arguments: list[str], report_to: tuple[str, ...]) -> str:
    """Spell the command that continues a run, with what its directory alone does not say."""
    words = [program(), command, "--resume", str(out)]
    if config.address not in (None, "local"):
        words += ["--address", config.address]
    for file in sorted(files_named(arguments)):
        words += ["--code", str(file)]
    if report_to != DEFAULT:
        words += ["--report-to", *report_to]
    return shlex.join(words)


def _print_plan(config: Config) -> None:
    from fedray.federation.plan import bytes_planned, make_plan, steps_planned

    plan = make_plan(config)
    plan.check(config)
    steps = steps_planned(config, plan)
    sizes = plan.shards.sizes
    actors = {None: "as many as fit", 0: "none (this process)"}.get(config.actors, config.actors)
    planned, messages = bytes_planned(config, plan), sum(map(len, steps))
    kept = config.fold.memory(plan.round(config, 0))
    down = planned.first * len(steps[0]) + planned.down * (messages - len(steps[0]))
    table = Table("what", "value", title="dry run: nothing is trained")
    for name, value in {
        "clients": f"{config.clients}, of which {config.cohort_size} take part in a round",
        "examples": f"{sizes.sum():,} in all; per client {sizes.min():,} to {sizes.max():,}",
        "rounds": f"{config.rounds}",
        "actors": f"{actors}, {config.cpus_per_actor:g} CPUs and {config.gpus_per_actor:g} GPUs each",
        "parameters": f"{plan.layout.size:,}",
        "steps": f"{sum(map(sum, steps)):,} in all; {sum(max(each, default=0) for each in steps):,} sequential",
        "bytes": f"{planned.down:,} down to a client in a round, {planned.up:,} up",
        "bytes in all": f"{down / 1e6:,.1f} MB down, {planned.up * messages / 1e6:,.1f} up",
        **({"uploads kept": f"{kept / 1e6:,.1f} MB at the driver"} if kept else {}),
        **({"malicious": ", ".join(map(str, sorted(plan.malicious)))} if plan.malicious else {}),
        **_privacy_planned(config),
    }.items():
        table.add_row(name, value)
    Console().print(table)
    if config.clients <= 32:
        clients = Table("client", "examples", "steps a round")
        for client, size in enumerate(sizes):
            clients.add_row(str(client), f"{size:,}", f"{config.steps(int(size)):,}")
        Console().print(clients)


def _privacy_planned(config: Config) -> dict[str, str]:
    """Say what noise will prove after some of the rounds, and after all."""
    release = release_of(config)
    if release is None:
        return {}
    some = sorted({max(1, config.rounds * share // 10) for share in (1, 2, 5, 10)})
    spent = ", ".join(f"{epsilon({release: rounds}, config.delta):.3g} after {rounds:,}" for rounds in some)
    return {
        "privacy": f"noise of {release.multiplier:.4g} times the clip; {release.neighbours}, δ = {config.delta:g}",
        "ε": f"{spent} rounds",
    }
