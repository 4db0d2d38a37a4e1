"""fedray stop: end a run at its last complete round."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from fedray.commands.settings import command_of
from fedray.commands.terminal import program
from fedray.errors import RunError, UserError
from fedray.record.copies import local
from fedray.record.following import ask_to_stop, follow, goes_on
from fedray.record.run import Run


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End a run that goes on in another process, here or on a cluster, at its last complete round."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL."""
    timeout: float = 120.0
    """Seconds to wait until the run has ended."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray stop`."""
    options = tyro.cli(Stop, args=arguments, prog="fedray stop")
    run = Run.open(local(options.run))
    if not goes_on(run):
        raise UserError(f"no process is writing the run at {run}; `fedray runs` lists those that go on.")
    ask_to_stop(run)
    print("stopping …", file=sys.stderr)
    deadline = time.monotonic() + options.timeout
    for _ in follow(run):
        if time.monotonic() > deadline:
            raise RunError(f"the run at {run} was asked to stop, and goes on after {options.timeout:g} s.")
    rows = len(run.rows)
    if run.result is not None:
        print(f"the run was complete, after {rows} rounds")
        return
    print(f"stopped after round {rows}\nContinue this run with: {program()} {_command(run)} --resume {run}")


def _command(run: Run) -> str:
    """Return the command that resumes a run."""
    try:
        return command_of(run.config)
    except UserError:  # of a task of the user's own, whose file is not named here
        return "train"
