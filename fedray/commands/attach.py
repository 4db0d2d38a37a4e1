"""fedray attach: follow a run that another process does."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fedray.commands.terminal import print_table, program, progress
from fedray.errors import RunError
from fedray.record.copies import local
from fedray.record.following import follow
from fedray.record.run import Run


@dataclass(frozen=True, kw_only=True)
class Attach:
    """Show the rounds of a run that goes on in another process, here or on a cluster, until it ends.

    Ctrl-C ends the showing, and not the run.
    """

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray attach`."""
    options = tyro.cli(Attach, args=arguments, prog="fedray attach")
    run = Run.open(local(options.run))
    rounds, done = run.saved["config"]["rounds"], 0
    try:
        with progress(rounds) as (on_row, show):
            for rows in follow(run):
                for row in rows:
                    on_row(row)
                done += len(rows)
                show("rounds", done, rounds)
    except KeyboardInterrupt:
        print(f"\nThe run goes on. End it with: {program()} stop {run}", file=sys.stderr)
        raise
    if run.result is None:
        raise RunError(f"the run at {run} ended after round {done} of {rounds}; it can be resumed.")
    print_table({str(run): run.directory})
