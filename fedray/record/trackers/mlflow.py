"""MLflow. The environment names the experiment (MLFLOW_EXPERIMENT_NAME) and where it is (MLFLOW_TRACKING_URI)."""

import os
import re
from typing import Any

from fedray.record.trackers import PROJECT, Entry, Tracked

TAG = "fedray.id"


class MLflow:
    """A run of MLflow, found again by a tag; a second tag groups the trials of a sweep."""

    _client: Any = None
    _run = ""

    def start(self, run: Tracked) -> int | None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = client.search_runs([number], f"tags.`{TAG}` = '{run.id}'")
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, "RUNNING")
        else:
            tags = {TAG: run.id} | ({"fedray.group": run.group} if run.group else {})
            self._run = client.create_run(number, tags=tags, run_name=run.name).info.run_id
        self._client = client
        shown = client.get_metric_history(self._run, "round") if found else []
        if not shown:
            settings = [Param(_name(key), str(value)[:6000]) for key, value in run.settings.items()]
            for start in range(0, len(settings), 100):  # the most it takes at once
                client.log_batch(self._run, params=settings[start : start + 100])
        return max((metric.step for metric in shown), default=None)

    def log(self, entry: Entry) -> None:
        from mlflow.entities import Metric

        for name, path in entry.pictures.items():
            self._client.log_artifact(self._run, path, name)
        if entry.table:
            columns = {key: [row[key] for row in entry.table] for key in entry.table[0]}
            self._client.log_dict(self._run, columns, "scores.json")
        at = int(entry.time * 1000)
        metrics = [Metric(_name(name), value, at, entry.round) for name, value in entry.scalars.items()]
        # At once, and last: a round that has its numbers has all.
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self) -> None:
        self._client.set_terminated(self._run)


def _name(name: str) -> str:
    """Spell a name as MLflow allows it, which stores parts between slashes as folders."""
    return re.sub(r"[^\w\-. ]+", ".", name).strip(".")
