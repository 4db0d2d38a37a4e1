"""Sweeps on Ray Tune: many different runs in parallel. A trial is a whole federated run and its own driver.

We discard Tune's own experiment state. The run directories, found by config hash, are the record.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # before Tune is imported: runs log themselves
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # not every round is scored
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler

from fedray.cluster.actors import keep_to_fraction
from fedray.cluster.connection import connected, send_own_code
from fedray.cluster.directories import (
    Sweep,
    Trial,
    collect,
    leave_reason,
    name_trial,
    outcome,
    place,
    save_record,
    settled,
)
from fedray.cluster.driver import check_outside_images
from fedray.cluster.metrics import Metrics
from fedray.cluster.nodes import Share, alive, count_slots, describe, free
from fedray.cluster.pool import open_pool
from fedray.cluster.progress import Measured, News, OnNews, followed, measured_in
from fedray.cluster.trials import Experiment, expand, images_planned, settings_of
from fedray.cluster.versions import check_versions
from fedray.config import Config
from fedray.errors import RunError, UserError, check_name, reason
from fedray.federation.added import Added, Own
from fedray.federation.evaluation import check_features
from fedray.federation.fit import fit, prepare
from fedray.federation.round import Session
from fedray.record.copies import local
from fedray.record.provenance import environment
from fedray.record.run import FAILED, STOPPED, Run
from fedray.scores.metrics import higher_is_better, metric_of
from fedray.storage import discard

RETRIES = 2  # of a trial that fails; it continues from its last complete round


class OwnOfSweep(Own, total=False):
    """What a sweep takes beside settings: that of its runs, and callbacks of Ray Tune."""

    tune_callbacks: Sequence[tune.Callback]
    """Ray Tune's own callbacks, such as its loggers: they see a trial's name, and of each round its number, images,
    loss and scores."""


def sweep(
    experiment: Experiment,
    out: str | Path,
    *,
    resume: bool = False,
    again: bool = False,
    asha: str | None = None,
    on_news: OnNews | None = None,
    **own: Unpack[OwnOfSweep],
) -> Sweep:
    """Run every trial of an experiment, as many in parallel as fit, each in its own directory in `out`.

    A directory's name ends in its configuration's hash, and a configuration that `out` already has is not run twice:
    sweeps may share `out` and so their runs. With `config.actors` None a trial gets a fair share of the machine: if
    that is no more than one actor, it trains its clients in its own process.

    Args:
        experiment: its name and question are in the record, `out`/NAME.sweep.json.
        resume: continue a sweep that was stopped: complete trials are kept, others continue from their last round.
        again: run anew, in new directories, what `out` has already.
        on_news: is told how trials go on; without it, a terminal or notebook shows a bar for each.
        asha: a score; trials that are behind in it after as many images trained are stopped early (Li et al. 2020,
            arXiv:1810.05934). Rounds would compare unequal work.
        own: `metrics`, `callbacks` and `report_to` of each trial, as for `fedray.run` (trackers group the trials by the
            experiment's name), and `tune_callbacks`, as `OwnOfSweep` says.

    Raises:
        UserError: the request cannot be carried out; nothing was started.
        RunError: no trial could start. (A trial that fails is in `missing`.)
    """
    out = local(out).absolute()
    configs = expand(experiment.base, experiment.space)
    for config in configs:
        try:
            config.check()
        except UserError as error:
            raise UserError(f"the trial {name_trial(settings_of(config, experiment.space))}: {error}") from None
        check_outside_images(out, config)
    if asha is not None and any(config.evaluate_every is None for config in configs):
        raise UserError("--asha stops trials by scores along the way: say --evaluate-every.")
    trials = place(experiment, configs, out, resume=resume, again=again)
    dataset = experiment.base.task.dataset()  # decoded here, with progress, for all trials
    for trial in trials:
        if settled(trial) and trial.config.task == experiment.base.task:
            Run(trial.directory).check_data({"images_sha256": dataset.sha256})
    for config in {trial.config.features: trial.config for trial in trials if not settled(trial)}.values():
        if config.task == experiment.base.task:
            check_features(config, dataset)
    with connected(experiment.base.address) as private, followed(len(dataset), on_news) as on_news:
        check_versions(experiment.base.node_label)
        left = [trial for trial in trials if not settled(trial)]
        left = [replace(trial, config=_with_actors(trial, len(left))) for trial in left]
        save_record(experiment, out, trials)
        waiting = {trial.directory for trial in left}
        for trial in trials:
            rows = Run(trial.directory).rows
            status = "waiting" if trial.directory in waiting else outcome(trial)
            on_news(News(trial, status, len(rows), measured_in(rows)))
        if left:
            watch = [_Watch({trial.directory.name: trial for trial in left}, on_news), *own.get("tune_callbacks", ())]
            _tune(left, len(dataset), asha, Added.of(own, experiment.name), watch, not private)
    return collect(trials)


def _with_actors(trial: Trial, trials: int) -> Config:
    """Give a trial's configuration a number of actors: its share of the cluster, unless it says how many.

    0 trains all clients in the trial's own process. Raises `UserError` if it does not fit, now or ever.
    """
    config = trial.config
    try:
        slots = count_slots(config)
    except UserError as error:
        raise UserError(f"the trial {trial.directory.name}: {error}") from None
    if config.actors is None:
        share = min(config.cohort_size, slots // trials)
        several = len(alive()) > 1 or config.node_label is not None
        # The trial's own process stays on this node; an actor can be on any.
        return replace(config, actors=max(1, share) if several else share if share > 1 else 0)
    return replace(config, actors=min(config.actors, config.cohort_size))


def bundles(config: Config) -> list[dict[str, float]]:
    """List what a trial needs: the driver's bundle (on this node, where the runs are), then one per actor."""
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    share = Share.of(config)
    actor = {"CPU": share.cpus, "GPU": share.gpus}
    return [here, *[actor] * config.actors] if config.actors else [here | actor]


def group_of(config: Config) -> tune.PlacementGroupFactory:
    """Make what a trial asks Ray for: its bundles, close to each other, those of actors where their label is."""
    asked = bundles(config)
    if config.node_label is None:
        return tune.PlacementGroupFactory(asked)
    key, value = config.node_label.split("=", 1)
    labels: list[dict[str, str]] = [{key: value} if "CPU" in bundle else {} for bundle in asked]
    return tune.PlacementGroupFactory(asked, bundle_label_selector=labels)


def _tune(
    trials: list[Trial],
    examples: int,
    asha: str | None,
    added: Added,
    callbacks: list[tune.Callback],
    watched: bool,
) -> None:
    """Run trials on Tune until each is complete, stopped or failed."""
    send_own_code()
    by_name = {trial.directory.name: trial for trial in trials}
    scheduler = None
    if asha is not None:
        most = max(images_planned(trial.config, examples) for trial in trials)
        mode = "max" if higher_is_better(asha) else "min"
        # A trial that has trained to its end is not to be stopped before its model is saved.
        scheduler = ASHAScheduler(
            time_attr="images", metric=asha, mode=mode, max_t=most, grace_period=most // 16 + 1, stop_last_trials=False
        )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial that fails is told by us
    given = {"provenance": environment(), "added": added, "asha": asha, "watched": watched}
    train = tune.with_parameters(_train, trials=by_name, **given)
    resources = tune.with_resources(train, lambda chosen: group_of(by_name[chosen["trial"]].config))
    with tempfile.TemporaryDirectory(prefix="fedray-tune-") as scratch:  # all that matters is in the runs
        tuner = tune.Tuner(
            resources,
            param_space={"trial": tune.grid_search(list(by_name))},
            # Processes are reused, unless ASHA may stop one in the middle.
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=asha is None),
            run_config=tune.RunConfig(
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=callbacks,
                progress_reporter=tune.CLIReporter(),  # silent; its own for notebooks clears what is there
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        except TuneError as error:
            raise RunError(f"Ray Tune could not go on: {reason(error)}; resume the sweep.") from error
        for result in results:
            trial = by_name[result.config["trial"]]
            if result.error and not settled(trial) and not (trial.directory / FAILED).exists():
                leave_reason(trial, FAILED, f"Ray Tune gave it up: {reason(result.error)}")


def _train(
    chosen: dict[str, Any],
    trials: dict[str, Trial],
    provenance: dict[str, Any],
    added: Added,
    asha: str | None,
    watched: bool,
) -> None:
    """Train a trial in its own process, which is the driver of a new run or continues one from its last round."""
    trial = trials[chosen["trial"]]
    config, run = trial.config, Run(trial.directory)
    for name in (FAILED, STOPPED):
        discard(run.directory / name)
    begun = (run.directory / "config.json").exists()
    try:
        if config.actors == 0:
            keep_to_fraction(config)
        images = sum(row["images"] for row in run.rows)
        dataset = config.task.dataset()
        with open_pool(config, dataset, str(run.directory)) as pool:
            added = added.beside(Metrics(str(run.directory))) if watched else added
            session = Session(config, prepare(config, run, begun, dataset), pool, run, added=added)
            for row in fit(session, provenance, begun):
                images += row["images"]
                scores = {name: score["value"] for name, score in row["scores"].items()}
                if asha is not None and scores:
                    check_name("score", asha, scores)
                loss = math.nan if row["loss"] is None else row["loss"]  # of an empty round
                told = {"round": row["round"], "images": images, "loss": loss}
                # Nothing to stop a trial by once it has trained to its end: its model is yet to be saved.
                tune.report(told | (scores if asha is None or row["round"] < config.rounds else {}))
    except Exception as error:
        kind = "" if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: "
        leave_reason(trial, FAILED, f"{kind}{error}")
        if not isinstance(error, UserError):  # which another try would not mend
            raise


class _Watch(tune.Callback):
    """A callback that reports the progress of trials, and ends a sweep in which nothing can start."""

    def __init__(self, trials: dict[str, Trial], on_news: Callable[[News], None]) -> None:
        self.trials = trials
        self.on_news = on_news
        self.moved = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to restore a sweep; we restore it from the run directories

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if any(trial.status == "RUNNING" for trial in trials):
            self.moved = time.monotonic()
            return
        waiting = [self.trials[trial.config["trial"]].config for trial in trials if not trial.is_finished()]
        timeout = max((config.start_timeout for config in waiting), default=math.inf)
        if time.monotonic() > self.moved + timeout:
            need = bundles(waiting[0])
            total = {name: sum(bundle.get(name, 0) for bundle in need) for name in ("CPU", "GPU")}
            raise RunError(
                f"no trial could start in {timeout:g} s (--start-timeout). One needs {describe({'': total})}; free "
                f"now: {describe(free())}."
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "running", len(Run(self.trials[trial.config["trial"]].directory).rows))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        measured = {name: value for name, value in result.items() if name == "loss" or metric_of(name)}
        self._tell(trial, "running", result["round"], measured)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["trial"]]
        rounds, rows = (trial.last_result or {}).get("round", 0), Run(ours.directory).rows
        if Run(ours.directory).result is None and not (ours.directory / FAILED).exists():
            leave_reason(ours, STOPPED, f"ASHA stopped it after round {rounds}")
        self._tell(trial, outcome(ours), rounds, measured_in(rows))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["trial"]]
        if not (ours.directory / FAILED).exists():
            leave_reason(ours, FAILED, "its process ended (killed, or out of memory)")
        self._tell(trial, "failed", (trial.last_result or {}).get("round", 0))

    def _tell(self, trial: Any, status: str, rounds: int, measured: Measured | None = None) -> None:
        self.on_news(News(self.trials[trial.config["trial"]], status, rounds, measured or {}))
