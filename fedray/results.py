"""Run directories as tables."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from fedray.choices import UserError
from fedray.config import PLACEMENT
from fedray.record import Run
from fedray.worker import Row


def summary(runs: Mapping[str, str | Path]) -> pd.DataFrame:
    """One row per complete run, under the name given to it.

    Columns: loss (mean training loss of the last round), the loss on held-out examples and the scores where there
    are any, passes over the data, sequential steps (of the slowest client, over all rounds), MB down and up (10⁶
    bytes, over all clients and rounds), seconds.

    Raises:
        UserError: a run is not complete.
    """
    table = {}
    for name, directory in runs.items():
        result = _result(Run.open(directory))
        table[name] = {
            "loss": result["loss"],
            **({"held-out loss": result["held_out"]["global"]} if result["held_out"] else {}),
            **{name: score["value"] for name, score in result["scores"].items()},
            "passes": result["passes"],
            "sequential steps": result["sequential_steps"],
            "MB down": result["bytes_down"] / 1e6,
            "MB up": result["bytes_up"] / 1e6,
            "seconds": result["seconds"],
        }
    return pd.DataFrame.from_dict(table, orient="index")


def score_table(runs: Iterable[str | Path]) -> pd.DataFrame:
    """Scores with their intervals, a row for each score of each setting.

    Complete runs whose settings differ in the seed alone are one setting; a seed counts once. Columns: run (the first
    one's directory), score, value (the mean), std, over (what std was taken over: seeds where there are several, else
    resamples of one run's samples), n (samples a run drew), note.

    Raises:
        UserError: a run is not complete.
    """
    settings: dict[str, dict[int, Run]] = {}
    for directory in runs:
        run = Run.open(directory)
        config = run.saved["config"]
        depends_on = {name: value for name, value in config.items() if name not in (*PLACEMENT, "seed")}
        depends_on["images"] = run.saved.get("images_sha256")
        settings.setdefault(json.dumps(depends_on, sort_keys=True), {}).setdefault(config["seed"], run)
    rows = []
    for seeds in settings.values():
        same = list(seeds.values())
        results = [_result(run)["scores"] for run in same]
        for name, first in results[0].items():
            values = pd.Series([result[name]["value"] for result in results if name in result])
            several = {"std": values.std(), "over": f"{len(values)} seeds"} if len(values) > 1 else {}
            rows.append({"run": str(same[0].directory), "score": name, **first, "value": values.mean()} | several)
    return pd.DataFrame(rows, columns=["run", "score", "value", "std", "over", "n", "note"])


def _result(run: Run) -> Row:
    if run.result is None:
        raise UserError(f"the run at {run.directory} is not complete; finish it with --resume {run.directory}.")
    return run.result
