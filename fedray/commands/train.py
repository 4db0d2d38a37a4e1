"""fedray train and fedray finetune: a federated run, or one run per client."""

import argparse
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fedray.commands import aliases, config_file, share
from fedray.commands.dry_run import print_plan
from fedray.commands.flags import flags_of
from fedray.commands.push import Hub
from fedray.commands.settings import Settings, T, ask, command_of, preset_help, presets_of
from fedray.commands.terminal import print_table, program, progress
from fedray.config import Config
from fedray.errors import Detached, RunError, UserError, check_name
from fedray.forms import files_named
from fedray.presets import PRESETS
from fedray.record.publishing import take_over
from fedray.record.run import Run
from fedray.record.trackers import DEFAULT, open_trackers
from fedray.storage import located, shown, upload
from fedray.tasks.ddpm import count_classes
from fedray.tasks.named import task_class

FIRST = {"train": "digits", "finetune": "sd"}  # presets
DATA = {"--dataset-name", "--train-data-dir"}


@dataclass(frozen=True, kw_only=True)
class Train(Hub, Settings[T]):
    preset: Annotated[str | None, preset_help("train")]
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """File of settings (YAML, TOML, or a run's config.json); flags come on top. `fedray config` prints one."""
    out: Path | None = None
    """Directory of the run, or its URL, as s3://BUCKET/RUN; by default runs/PRESET-DATE-TIME."""
    resume: Path | None = None
    """Continue the run in this directory, or at this URL; only settings of placement may be given with it."""
    take_over: bool = False
    """Take a run at a URL from the process that writes it, or did so when it ended."""
    local_only: bool = False
    """Train every client alone, without a federation: what the others are worth. A run per client."""
    task_class: Annotated[str | None, tyro.conf.arg(name="task")] = None
    """A task of your own, FILE.py:CLASS, in place of a preset's: its fields become flags."""
    class_conditional: bool = False
    """Learn each image given its label: --num-class-embeds as many as the data's labels need."""
    report_to: tuple[str, ...] = DEFAULT
    """Where the run is shown: tensorboard, wandb, trackio, mlflow, none, or a class of your own, FILE.py:CLASS."""
    push_to_hub: bool = False
    """After the run, push its model to the Hugging Face hub."""
    code: tuple[Path, ...] = ()
    """Files of your own classes that a resumed run names: only those given here, or in another flag, may run."""
    dry_run: bool = False
    """Print what would be done and written (clients, their labels, steps, bytes, files) and train nothing."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Train[T]):
    preset: Annotated[str | None, preset_help("finetune")]
    class_conditional: Annotated[bool, tyro.conf.Suppress] = False


def main(arguments: list[str]) -> None:
    """Parse and run `fedray train`."""
    _main(arguments, "train", "Train a model by federated averaging, and write a run directory.")


def finetune(arguments: list[str]) -> None:
    """Parse and run `fedray finetune`."""
    what = "Fine-tune Stable Diffusion by federated LoRA, and write a run directory."
    _main(arguments, "finetune", what)


FLAGS: dict[str, type[Train]] = {"train": Train, "finetune": Finetune}


@dataclass(frozen=True)
class Known:
    """What decides which flags there are."""

    preset: str | None
    resume: Path | None
    task: str | None
    config: Path | None

    @classmethod
    def of(cls, arguments: list[str]) -> "Known":
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("preset", "task"):
            first.add_argument(f"--{name}")
        for name in ("resume", "config"):
            first.add_argument(f"--{name}", type=Path)
        return cls(**vars(first.parse_known_args(arguments)[0]))


def asked_for(arguments: list[str], command: str, what: str, name: str = "") -> tuple[Train, Config, list[str]]:
    """Parse the arguments of a command that trains; return them also with those of the file that they name.

    Args:
        name: of a command that has the same arguments, for its help.
    """
    known = Known.of(arguments)
    values = {} if known.config is None else config_file.read(known.config)
    if known.config is not None and known.resume:
        raise UserError("--config and --resume are both given; a resumed run keeps its settings.")
    task = str(values.pop("task", "")) or None
    if known.config is not None and task is not None:
        config_file.check_code(known.config, [task], arguments)
        if ".py:" not in task:
            _check_task(task, command, known.config)
            task = None
    known = replace(known, task=known.task or task, preset=known.preset or values.get("preset"))
    base, preset = _base(known, [*arguments, *(f"--{key}" for key in values)], command)
    if known.config is not None:
        all_flags = flags_of(FLAGS[command], type(base.task))
        arguments = [*config_file.words(known.config, values, all_flags, arguments), *arguments]
    words, _ = share.whole(arguments)
    asked, config = ask(FLAGS[command], base, words, name or command, what, preset)
    return asked, _conditional(config) if asked.class_conditional else config, arguments


def _conditional(config: Config) -> Config:
    """Condition the U-Net on the labels of its data. Raises `UserError` where that cannot be."""
    task: Any = config.task
    if not hasattr(task, "num_class_embeds"):
        raise UserError(
            "--class-conditional is about the U-Net that fedray builds; a task of your own has flags of its own."
        )
    if task.num_class_embeds is not None:
        return config
    config.check()
    return replace(config, task=replace(task, num_class_embeds=count_classes(task.dataset())))


def _check_task(task: str, command: str, file: Path) -> None:
    """Raise `UserError` unless a task of fedray's own is what the command trains."""
    cls = task_class(task)
    right = command_of(replace(Config(local_epochs=1), task=cls()))
    if right != command:
        raise UserError(f"--config {file} is about the task {task}: say `fedray {right} --config {file}`.")


def _base(known: Known, arguments: list[str], command: str) -> tuple[Config, str | None]:
    """Return the settings to start from, and their name: a run's, those of a task of the user's own, or a preset's."""
    if known.resume:
        run = Run.open(known.resume)
        base = run.config_with(files_named(arguments))
        if command_of(base) != command:
            raise UserError(f"{run} is a run of `fedray {command_of(base)}`; resume it with that.")
        return base, known.preset
    if known.task:
        task = task_class(known.task)()
        base = PRESETS[known.preset] if known.preset else Config(local_epochs=1)
        return replace(base, task=task, features=None), known.preset
    given = {aliases.name_of(argument) for argument in arguments}
    preset = known.preset or FIRST[command]
    if command == "train" and not known.preset and DATA & given and aliases.foreign(arguments, ()):
        preset = "unconditional"
        print(f"settings  those of --preset {preset}, since the flags are those of diffusers' script", file=sys.stderr)
    check_name("preset", preset, presets_of(command))
    base = PRESETS[preset]
    if "--train-data-dir" in given and "--dataset-name" not in given and preset == FIRST["train"]:
        base = replace(base, task=replace(base.task, dataset_name="imagefolder"))
    return base, preset


def directory_of(asked: Train, config: Config, words: list[str]) -> tuple[Path, bool]:
    """Return the directory of the run, and whether it is continued there. Raises `UserError`."""
    if asked.resume and asked.out:
        raise UserError("--out and --resume are both given; a resumed run stays in its directory.")
    if asked.resume and any(aliases.name_of(word) == "--preset" for word in words):
        raise UserError("--preset and --resume are both given; a resumed run keeps its settings.")
    resume = asked.resume or aliases.run_to_resume(words, asked.out)
    out = resume or asked.out or Path("runs") / time.strftime(f"{asked.preset or config.task.name}-%Y%m%d-%H%M%S")
    return out, resume is not None


def _main(arguments: list[str], command: str, what: str) -> None:
    asked, config, words = asked_for(arguments, command, what)
    out, resume = directory_of(asked, config, words)
    trackers = open_trackers(asked.report_to)
    if asked.push_to_hub:
        asked.check(out)
    if asked.dry_run:
        print_plan(config, out, resume)
        return
    if asked.local_only and resume:
        raise UserError("--local-only and --resume are both given; repeat the command with the same --out to go on.")
    if asked.local_only and config.only_client is not None:
        raise UserError("--local-only trains every client alone, and --only-client one of them; leave one out.")
    config.check()
    if asked.take_over:
        take_over(out)
    place = located(out)

    from fedray.cluster.alone import run_local_only  # Ray and torch take seconds to import: mistakes are told before
    from fedray.cluster.driver import run
    from fedray.commands.cautions import cautions
    from fedray.reports.results import summary

    dataset = config.task.dataset()  # decoding shows progress of its own
    for sentence in cautions(config, dataset):
        print(f"privacy   {sentence}", file=sys.stderr)
    if share.whole(words)[1]:
        config = share.shared(config, dataset)
    if asked.local_only:
        with progress(config.rounds, alone=True) as (on_row, show):
            runs = run_local_only(config, out, on_row=on_row, show=show, dataset=dataset, report_to=trackers)
        directories = {run.directory.name: run.directory for run in runs}
        summary(directories).to_csv(place / "summary.csv", index_label="run")
        upload(place / "summary.csv")
        print_table(directories, mean=True)
        print(f"table     {shown(place / 'summary.csv')}")
        print(f"runs      {shown(place)}")
        return
    resuming = _resuming(command, shown(place), config, arguments, asked.report_to)
    with progress(config.rounds) as (on_row, show):
        try:
            finished = run(config, out, resume=resume, on_row=on_row, show=show, dataset=dataset, report_to=trackers)
        except Detached:
            print(f"\nThe run goes on on the cluster. Follow it with: {resuming}", file=sys.stderr)
            raise
        except (KeyboardInterrupt, RunError):
            if (place / "config.json").exists():
                print(f"\nContinue this run with: {resuming}", file=sys.stderr)
            raise
    print_table({shown(place): finished.directory})
    if config.evaluate_samples:
        print(f"samples   {shown(place / 'samples.png')}")
    if asked.push_to_hub:
        asked.push(finished)
    print(f"run       {shown(place)}\nnext      {program()} sample {shown(place)} --num-images 100 --seed 1")


def _resuming(command: str, out: str, config: Config, arguments: list[str], report_to: tuple[str, ...]) -> str:
    """Spell the command that continues a run, with what its directory alone does not say."""
    words = [program(), command, "--resume", out]
    if config.address not in (None, "local"):
        words += ["--address", config.address]
    for file in sorted(files_named(arguments)):
        words += ["--code", str(file)]
    if report_to != DEFAULT:
        words += ["--report-to", *report_to]
    return shlex.join(words)
