"""Trackio. The environment names the project (TRACKIO_PROJECT) and where it is (TRACKIO_DIR, TRACKIO_SPACE_ID)."""

import os
from typing import Any

from fedray.record.trackers import PROJECT, Entry, Tracked


class Trackio:
    """A run of Trackio, in the group of its sweep. Trackio knows runs by their name, so it has the run's id in it."""

    _run: Any = None

    def start(self, run: Tracked) -> int | None:
        import trackio

        self.finish()
        self._run = trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id[:6]}",
            group=run.group,
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return None if self._run._next_step == 0 else self._run._next_step - 1  # it has no public name

    def log(self, entry: Entry) -> None:
        import trackio

        values: dict[str, Any] = dict(entry.scalars)
        values |= {name: trackio.Image(str(path)) for name, path in entry.pictures.items()}
        if entry.table:
            values["scores"] = trackio.Table(columns=list(entry.table[0]), data=[list(r.values()) for r in entry.table])
        self._run.log(values, step=entry.round)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
