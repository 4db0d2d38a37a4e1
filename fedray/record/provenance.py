"""The provenance of a run: versions, machine, commit, command."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return versions, machine, git commit of fedray (None if it is not a checkout), command and time."""
    packages = ("fedray", "torch", "diffusers", "ray", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()},
        "git_commit": _git_commit(),
        "command": without_secrets(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def without_secrets(command: list[str]) -> list[str]:
    """Leave the value of --hub-token out of a command: model cards show it."""
    kept = []
    for before, word in zip(["", *command], command, strict=False):
        name = word.partition("=")[0].replace("_", "-")
        after = before.replace("_", "-") == "--hub-token"
        kept.append("…" if after else f"{name}=…" if name == "--hub-token" and "=" in word else word)
    return kept


def _git_commit() -> str | None:
    here = Path(__file__).parents[1]
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
