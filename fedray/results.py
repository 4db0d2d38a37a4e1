"""Run directories as tables."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fedray.choices import UserError
from fedray.record import Run


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
        run = Run.open(directory)
        result = run.result
        if result is None:
            raise UserError(f"the run at {directory} is not complete; finish it with --resume {directory}.")
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
