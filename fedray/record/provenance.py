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
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


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
