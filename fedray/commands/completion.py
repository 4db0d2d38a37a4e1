"""fedray completion: a script by which a shell completes commands, flags and names."""

import argparse
import importlib
from dataclasses import dataclass
from types import ModuleType

import shtab
import tyro

from fedray.commands.flags import Flag, flags_of
from fedray.errors import check_name
from fedray.menus import LINKS
from fedray.presets import PRESETS
from fedray.record.trackers import OURS as TRACKERS
from fedray.tasks.ddpm import DDPM
from fedray.tasks.lora import LoRA
from fedray.tasks.samplers import SAMPLERS
from fedray.vector.optimizer import LR_SCHEDULERS

# The class of each command's flags, and the task whose settings are flags too.
CLASSES: dict[str, tuple[str, type | None]] = {
    "train": ("Train", DDPM), "finetune": ("Finetune", LoRA), "plan": ("Train", DDPM), "config": ("Train", DDPM),
    "sweep": ("Flags", DDPM),
    "sample": ("Sample", None), "evaluate": ("Evaluate", None), "audit": ("Audit", None), "report": ("Report", None),
    "runs": ("Runs", None), "attach": ("Attach", None), "stop": ("Stop", None), "cache": ("Cache", None),
    "push": ("Push", None),
    "completion": ("Completion", None),
}  # fmt: skip

NAMES = {
    "--preset": list(PRESETS), "--sampler": list(SAMPLERS), "--lr-scheduler": list(LR_SCHEDULERS),
    "--mixed-precision": ["no", "bf16", "fp16"], "--weights": ["examples", "uniform"],
    "--report-to": [*TRACKERS, "none"], "--wire": ["float32", *LINKS.classes], "shell": list(shtab.SUPPORTED_SHELLS),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script for a shell, to be kept where it looks for such scripts.

    bash: fedray completion bash > ~/.local/share/bash-completion/completions/fedray
    zsh: fedray completion zsh > ~/.zfunc/_fedray (with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc)
    """

    shell: tyro.conf.Positional[str]
    """bash, zsh or tcsh."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray completion`."""
    shell = tyro.cli(Completion, args=arguments, prog="fedray completion").shell
    check_name("shell", shell, shtab.SUPPORTED_SHELLS)
    print(shtab.complete(parser(), shell))


def parser() -> argparse.ArgumentParser:
    """Make a parser of all commands, to be completed only: what users type is read by tyro."""
    whole = argparse.ArgumentParser("fedray", description="Simulate federated training of diffusion models.")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for command, (name, task) in CLASSES.items():
        module = importlib.import_module(f"fedray.commands.{command}")
        flags = flags_of(_class(module, name), task)
        sub = commands.add_parser(command, help=f"fedray {command}")
        for flag in {flag.name: flag for flag in flags}.values():
            _add(sub, flag)
    return whole


def _class(module: ModuleType, name: str) -> type:
    found = getattr(module, name, None) or getattr(importlib.import_module("fedray.commands.train"), name)
    assert isinstance(found, type)
    return found


def _add(sub: argparse.ArgumentParser, flag: Flag) -> None:
    text = flag.help.split(". ")[0].replace("%", "%%")
    if flag.switch:
        sub.add_argument(flag.name, flag.name.replace("--", "--no-", 1), action="store_true", help=text)
        return
    names = NAMES.get(flag.name) or (flag.metavar.split("|") if "|" in flag.metavar else None)
    names = [name for name in names or () if name not in ("CLASS",)] or None
    several = {"nargs": "*"} if flag.several else {}
    action = sub.add_argument(flag.name, help=text, choices=names, **several)  # type: ignore[arg-type]
    if flag.path:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
