"""Directories of a sweep: each trial's place, the sweep's record, and the outcome of trials. Without Ray."""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedray.cluster.trials import Experiment, settings_of
from fedray.config import Config
from fedray.errors import UserError
from fedray.files import as_json, read_json, write
from fedray.record.provenance import environment
from fedray.record.run import FAILED, RECORD, STOPPED
from fedray.reports.run import Run
from fedray.storage import shown, upload


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its configuration, the settings that the sweep changed, and its directory."""

    config: Config
    changes: dict[str, Any]
    directory: Path


class Sweep(NamedTuple):
    """The outcome of a sweep: its complete runs and, by directory name, why other trials are not complete."""

    runs: list[Run]
    stopped: dict[str, str]  # by ASHA
    missing: dict[str, str]

    def __repr__(self) -> str:
        return f"<fedray.Sweep · {self._counts()}>"

    def _repr_html_(self) -> str:
        lines = [[html.escape(run.directory.name), *map(html.escape, run.facts())] for run in self.runs]
        width = max(map(len, lines), default=1)
        lines = [line + [""] * (width - len(line)) for line in lines]
        for others, outcome in ((self.stopped, "stopped"), (self.missing, "missing")):
            lines += [[html.escape(name), outcome, html.escape(why)] for name, why in others.items()]
        rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
        return f"<div>{self._counts()}</div><table>{rows}</table>"

    def _counts(self) -> str:
        kinds = {"complete": self.runs, "stopped": self.stopped, "missing": self.missing}
        return " · ".join(f"{len(which)} {name}" for name, which in kinds.items() if which) or "no trials"


def name_trial(changes: Mapping[str, Any]) -> str:
    """Spell the settings of a trial as a part of a path: `clients-4-seed-0`."""
    text = "-".join(f"{name.removeprefix('task.')}-{value}" for name, value in changes.items())
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:100] or "base"


def place(experiment: Experiment, configs: list[Config], out: Path, *, resume: bool, again: bool) -> list[Trial]:
    """Choose each trial's directory in `out`: the one that holds its configuration already, or a new one.

    Raises:
        UserError: `out` does not allow it; or, with `resume`, the sweep in `out` has other trials.
    """
    record = out / f"{experiment.name}{RECORD}"
    if resume and again:
        raise UserError("--resume and --again are both given; give one of them.")
    if resume and not record.exists():
        raise UserError(
            f"there is no sweep {experiment.name!r} in {shown(out)} to resume; leave --resume out, or name its --out."
        )
    if record.exists() and not (resume or again):
        raise UserError(f"{shown(out)} holds this sweep already; go on with it by --resume, or choose another --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{shown(out)} is not a directory; choose another --out.")
    settings = list(experiment.space)
    varied = [name for name in settings if len({str(settings_of(config, [name])) for config in configs}) > 1]
    recorded = [trial["directory"] for trial in read_json(record)["trials"]] if resume else []
    trials = []
    for config in configs:
        ending = "-" + config.sha256[:8]
        existing = [name for name in recorded if ending in name] or sorted(
            path.name for path in out.glob(f"*{ending}*")
        )
        directory = existing[0] if existing and not again else name_trial(settings_of(config, varied)) + ending
        if existing and again:
            directory += f"-{len(existing) + 1}"
        trials.append(Trial(config, settings_of(config, settings), out / directory))
    lost = set(recorded) - {trial.directory.name for trial in trials}
    if lost:
        raise UserError(
            f"the sweep in {shown(out)} has a trial {min(lost)}, which is not among those asked for now; a resumed "
            f"sweep keeps its settings (it may have more values)."
        )
    return trials


def save_record(experiment: Experiment, out: Path, trials: list[Trial]) -> None:
    """Write `out`/NAME.sweep.json: the question, the settings that vary, and the trials. Raises `UserError`."""
    names = list(trials[0].changes)
    varied = [name for name in names if len({json.dumps(trial.changes[name], default=str) for trial in trials}) > 1]
    varied.sort(key=lambda name: name == "seed")  # last
    content = {
        "name": experiment.name,
        "question": experiment.question.strip(),
        **environment(),
        "varied": varied,
        "trials": [{"directory": trial.directory.name, "changes": trial.changes} for trial in trials],
    }
    record = out / f"{experiment.name}{RECORD}"
    if record.exists():  # the command that began the sweep is the one that repeats it
        content |= {name: value for name, value in read_json(record).items() if name not in ("varied", "trials")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(record, as_json(content))
        upload(record)
    except OSError as error:
        raise UserError(f"{shown(out)} cannot be written: {error.strerror}; choose another --out.") from None


def settled(trial: Trial) -> bool:
    """Tell whether nothing is left to do: the trial is complete, or was stopped early."""
    return Run(trial.directory).result is not None or (trial.directory / STOPPED).exists()


def outcome(trial: Trial) -> str:
    """Tell the outcome of a trial: complete, stopped or failed."""
    if Run(trial.directory).result is not None:
        return "complete"
    return "stopped" if (trial.directory / STOPPED).exists() else "failed"


def leave_reason(trial: Trial, name: str, why: str) -> None:
    """Leave a file in a trial's directory, FAILED or STOPPED, that says why it is not complete."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    (trial.directory / name).write_text(f"{why}\n")
    upload(trial.directory / name)


def collect(trials: list[Trial]) -> Sweep:
    """Open the complete runs, and read why the others are not complete."""
    by_outcome: dict[str, list[Trial]] = {"complete": [], "stopped": [], "failed": []}
    for trial in trials:
        by_outcome[outcome(trial)].append(trial)
    stopped, missing = (
        {trial.directory.name: _why(trial) for trial in by_outcome[key]} for key in ("stopped", "failed")
    )
    return Sweep([Run.open(trial.directory, trial.config) for trial in by_outcome["complete"]], stopped, missing)


def _why(trial: Trial) -> str:
    for name in (FAILED, STOPPED):
        if (trial.directory / name).exists():
            return (trial.directory / name).read_text(errors="replace").strip()
    return "it was not finished"
