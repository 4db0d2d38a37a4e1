"""The settings that a resumed run must keep."""

import dataclasses
import json
import math

from fedray.checks import flag
from fedray.config import PLACEMENT, Config
from fedray.errors import UserError
from fedray.record.run import Run
from fedray.record.upgrade import check_format

ENDLESS = ("constant", "constant_with_warmup")  # schedules that do not depend on how many rounds there are


def check_resumable(run: Run, asked: Config) -> None:
    """Raise `UserError`, naming the setting, if `asked` differs from a run's configuration in more than placement."""
    check_format(run.saved, run.directory)
    saved = Config().to_json() | run.saved["config"]  # what a version before a setting did is its default
    now = json.loads(json.dumps(asked.to_json(), default=str))  # tuples are lists in JSON
    defaults = {each.name: each.default for each in dataclasses.fields(asked.task)}
    old = {name: value for name, value in now["task"].items() if value == defaults.get(name)}
    saved["task"] = old | saved["task"]
    if asked.rounds != saved["rounds"]:
        _check_rounds(run, asked)
    for name in now:
        if name not in (*PLACEMENT, "rounds") and now[name] != saved.get(name):
            raise UserError(
                f"{flag(name)} is {now[name]} now, but was {saved.get(name)} when the run began; a resumed run "
                f"keeps its settings."
            )
    if bool(asked.gpus_per_actor) != bool(saved["gpus_per_actor"]):
        raise UserError(
            f"--gpus-per-actor is {asked.gpus_per_actor:g} now, but was {saved['gpus_per_actor']:g} when the run "
            f"began; a run that began on CPUs stays on CPUs, and one on GPUs on GPUs."
        )
    threads = max(1, math.floor(saved["cpus_per_actor"]))
    if asked.threads != threads:
        raise UserError(
            f"--cpus-per-actor {asked.cpus_per_actor:g} computes with {asked.threads} threads, but the run began "
            f"with {threads}, on which its float sums depend; keep the number of threads."
        )


def _check_rounds(run: Run, asked: Config) -> None:
    """Raise `UserError` unless a run may end after another number of rounds than it was begun with."""
    if asked.lr_scheduler not in ENDLESS:
        raise UserError(
            f"--rounds {asked.rounds}: the learning rate of --lr-scheduler {asked.lr_scheduler} follows from the "
            f"{run.saved['config']['rounds']} rounds that the run began with; begin another run."
        )
    if asked.target_epsilon is not None:
        raise UserError(
            f"--rounds {asked.rounds}: the noise of --target-epsilon {asked.target_epsilon:g} follows from the "
            f"{run.saved['config']['rounds']} rounds that the run began with; begin another run."
        )
    done = max([len(run.rows), *(int(path.stem.removeprefix("round-")) for path in [run.checkpoint()] if path)])
    if asked.rounds <= done:
        raise UserError(f"--rounds {asked.rounds}: the run at {run.directory} has done {done} already; ask for more.")
