"""What a user adds to a run in Python: scores, callbacks and trackers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from fedray.federation.callbacks import Callback
from fedray.federation.evaluation import Metric
from fedray.record.trackers import DEFAULT, Tracker, open_trackers


class Own(TypedDict, total=False):
    """What `fedray.run` and `fedray.sweep` take beside settings."""

    metrics: Mapping[str, Metric]
    """Scores of your own, by name: functions of (samples, the dataset's images), both uint8 [n, c, h, w], that return
    a number."""
    callbacks: Sequence[Callback]
    """What is called as the run goes on, and may stop it."""
    report_to: Sequence[str | Tracker]
    """Where the run is shown: tensorboard (the default), wandb, trackio, mlflow, FILE.py:CLASS, or trackers of your
    own."""


@dataclass(frozen=True)
class Added:
    """The same, with its trackers made; `group`: what they file the run under."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    trackers: Sequence[Tracker] = field(default_factory=lambda: open_trackers(DEFAULT))
    group: str | None = None

    @classmethod
    def of(cls, own: Own, group: str | None = None) -> "Added":
        """Make the trackers that are named. Raises `UserError` if there are none such."""
        trackers = open_trackers(own.get("report_to", DEFAULT))
        return cls(own.get("metrics", {}), own.get("callbacks", ()), trackers, group)

    def beside(self, tracker: Tracker) -> "Added":
        """Add a tracker."""
        return replace(self, trackers=[*self.trackers, tracker])
