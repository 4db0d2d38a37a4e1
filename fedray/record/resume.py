"""The settings that a resumed run must keep."""

import json
import math

from fedray.checks import flag
from fedray.config import PLACEMENT, Config
from fedray.errors import UserError
from fedray.record.run import Run
from fedray.record.upgrade import check_format


def check_resumable(run: Run, asked: Config) -> None:
    """Raise `UserError`, naming the setting, if `asked` differs from a run's configuration in more than placement."""
    check_format(run.saved, run.directory)
    saved = run.saved["config"]
    now = json.loads(json.dumps(asked.to_json(), default=str))  # tuples are lists in JSON
    for name in now:
        if name not in PLACEMENT and now[name] != saved.get(name):
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
