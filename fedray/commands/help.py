"""The short help of commands that have a flag for every setting: those that most people use, in groups."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from fedray import menus
from fedray.commands.flags import Flag
from fedray.config import Config

GROUPS = {
    "Run": "experiment smoke preset config_file out resume again asha init_from local_only dry_run",
    "Data and model": "dataset_name train_data_dir resolution channels random_flip max_train_samples "
    "class_conditional "
    "pretrained_model_name_or_path rank caption_column instance_prompt validation_prompt",
    "Federation": "clients fraction dropout_rate partition held_out_share rounds algorithm fold wire use_ema",
    "Local training": "local_epochs local_steps train_batch_size optimizer learning_rate lr_scheduler "
    "mixed_precision keep_optimizer seed",
    "Samples and scores": "sampler sampling_steps evaluate_samples evaluate_every features",
    "Placement": "actors cpus_per_actor gpus_per_actor address",
}
SHORTEST = 80  # columns
INDENT = 36  # of what a flag means


def short_help(command: str, what: str, flags: Sequence[Flag], config: Config, preset: str | None) -> str:
    """Make the short help of a command, with the values that a configuration has."""
    by_field = {flag.field: flag for flag in reversed(flags)}  # the command's own `task` before others
    width = max(SHORTEST, min(120, shutil.get_terminal_size().columns))
    places = "".join(f" {flag.name.upper()}" for flag in flags if not flag.name.startswith("--"))
    lines = [f"usage: fedray {command}{places} [OPTIONS]", "", *textwrap.wrap(what, width)]
    for title, fields in GROUPS.items():
        lines += ["", f"{title}:"]
        for flag in (by_field[field] for field in fields.split() if field in by_field):
            lines += _lines(flag, preset if flag.field == "preset" else value_of(flag.field, config), width)
    rest = len(flags) - sum(field in by_field for fields in GROUPS.values() for field in fields.split())
    lines += ["", f"--help-all has {rest} more. Names of diffusers' scripts are understood: docs/diffusers.md."]
    return "\n".join(lines) + "\n"


def _lines(flag: Flag, value: Any, width: int) -> list[str]:
    metavar = flag.metavar if len(flag.metavar) < 20 else "NAME"
    head = f"  {flag.name}" + ("" if flag.switch or not flag.name.startswith("--") else f" {metavar}")
    sentence = flag.help.split(". ")[0].rstrip(".")
    shown = "" if value in (None, "", False) else f" [{value}]"
    lines = textwrap.wrap(sentence, width - INDENT, max_lines=2, placeholder=" …") or [""]
    lines[-1] += shown
    return [f"{head:{INDENT - 2}}  {lines[0]}", *(" " * INDENT + line for line in lines[1:])]


def value_of(field: str, config: Config) -> Any:
    """Return a setting's value, in its short form."""
    value = getattr(config.task, field, None) if not hasattr(config, field) else getattr(config, field)
    if field in menus.TEXTS:
        return menus.TEXTS[field](value)
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
