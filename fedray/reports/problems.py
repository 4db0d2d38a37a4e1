"""Problems of runs, in sentences: runs that are not complete, trials without a run, runs that do not compare."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.errors import reason
from fedray.record.run import FAILED, STOPPED
from fedray.storage import shown


def unfinished(directory: Path, done: int = 0, rounds: int | None = None) -> str:
    """Say why a run is not complete."""
    after = f" after round {done} of {rounds}" if rounds else ""
    for name, what in ((FAILED, "failed"), (STOPPED, "was stopped early")):
        if (directory / name).is_file():
            why = (directory / name).read_text(errors="replace").strip().rstrip(".")
            return f"the trial {shown(directory)} {what}{after}: {why}."
    return f"the run {shown(directory)} is not complete: it stands{after}."


def left_out(directory: Path, clients: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """Say that clients failed, from one of each round in which any did."""
    why = f"client {clients[0].get('client')}: {clients[0]['outcome']}".rstrip(".")
    return f"in the run {shown(directory)} clients were left out of {len(clients)} of {rounds} rounds ({why})."


def not_begun(record: Path, begun: set[str]) -> list[str]:
    """Name the trials of a sweep that have no run and no reason for it."""
    try:
        trials = [Path(trial["directory"]).name for trial in json.loads(record.read_text())["trials"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{record} is damaged ({reason(error)}); which trials are missing is not known."]
    there = ("config.json", FAILED, STOPPED)
    return [
        f"the trial {shown(record.parent / trial)} of {record.name} has not begun."
        for trial in trials
        if trial not in begun and not any((record.parent / trial / name).exists() for name in there)
    ]


def mixed(saved: list[dict[str, Any]]) -> list[str]:
    """Say what the runs should have in common, and have not."""
    problems = []
    versions = [each["versions"] if isinstance(each.get("versions"), dict) else {} for each in saved]
    for what, values in {
        "versions of fedray": [each.get("fedray") for each in versions],
        "git commits of fedray": [each.get("git_commit") for each in saved],
        "sets of images": [each.get("images_sha256") for each in saved],
    }.items():
        counts = Counter(re.sub("([0-9a-f]{12})[0-9a-f]+", r"\1", str(value)) for value in values)
        if len(counts) > 1:
            listed = ", ".join(f"{value} ({count} run{'s' * (count > 1)})" for value, count in counts.items())
            problems.append(f"the runs are of {len(counts)} {what}: {listed}.")
    return problems
