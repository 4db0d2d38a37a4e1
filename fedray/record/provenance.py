"""The provenance of a run: versions, machine, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from fedray.lazy import torch


def environment() -> dict[str, Any]:
    """Return versions, machine, git commit of fedray (None if it is not a checkout), command and time."""
    return {
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": torch.cuda.device_count()},
        "git_commit": _git_commit(),
        "command": without_secrets(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Return the versions, in this process, of what a run's bits depend on."""
    packages = ("fedray", "torch", "diffusers", "ray", "numpy")
    return {name: _version(name) for name in packages} | {"python": platform.python_version()}


# Of both, what was there when this process began counts.
_version = cache(importlib.metadata.version)


def without_secrets(command: list[str]) -> list[str]:
    """Leave the value of --hub-token out of a command: model cards show it."""
    kept = []
    for before, word in zip(["", *command], command, strict=False):
        name = word.partition("=")[0].replace("_", "-")
        after = before.replace("_", "-") == "--hub-token"
        kept.append("…" if after else f"{name}=…" if name == "--hub-token" and "=" in word else word)
    return kept


@cache
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
