"""Weights & Biases. The environment names the project (WANDB_PROJECT) and the mode (WANDB_MODE=offline)."""

import os
import shutil
from pathlib import Path
from typing import Any

from fedray.record.trackers import PROJECT, Entry, Tracked

SHOWN = "rounds.txt"  # in the directory of an offline run: how many rounds are in it


class Wandb:
    """A run of Weights & Biases, of the same id, and in the group of its sweep. Its files are in RUN/wandb."""

    _run: Any = None

    def start(self, run: Tracked) -> int | None:
        import wandb

        self.finish()
        offline = os.environ.get("WANDB_MODE") == "offline"
        last = _uploaded(run) if offline else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            group=run.group,
            config=run.settings,
            dir=run.directory,
            resume="allow",
            reinit="create_new",  # several clients alone may be trained side by side
            settings=wandb.Settings(silent=True, console="off", symlink=False, x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="round")
        return last if offline else self._run.step - 1 if self._run.resumed else None

    def log(self, entry: Entry) -> None:
        import wandb

        values: dict[str, Any] = dict(entry.scalars)
        values |= {name: wandb.Image(str(path)) for name, path in entry.pictures.items()}
        if entry.table:
            columns = list(entry.table[0])
            values["scores"] = wandb.Table(columns=columns, data=[list(row.values()) for row in entry.table])
        self._run.log(values, step=entry.round, commit=True)
        if self._run.offline:
            (Path(self._run.dir).parent / SHOWN).write_text(str(entry.round))

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _uploaded(run: Tracked) -> int | None:
    """Remove what offline runs have left, but for what `wandb sync` has uploaded; return the last round of that."""
    last = None
    for place in (run.directory / "wandb").glob(f"offline-run-*-{run.id}"):
        if any(place.glob("*.wandb.synced")):
            shown = place / SHOWN
            last = max(last or 0, int(shown.read_text()) if shown.exists() else 0)
        else:
            shutil.rmtree(place)
    return last
