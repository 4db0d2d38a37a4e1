"""Ray Tune: many runs that differ, side by side. A trial is a whole federated run, and its own driver."""

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # before Tune is imported: runs log themselves
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # not every round is scored
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler

from fedray.cluster.actors import (
    START_TIMEOUT,
    check_apart,
    connected,
    count_slots,
    describe,
    keep_to_fraction,
    open_pool,
)
from fedray.cluster.trials import Space, expand, images_planned, settings_of
from fedray.config import Config
from fedray.errors import RunError, UserError, check_name, reason
from fedray.federation.engine import fit
from fedray.federation.evaluation import Metric, check_features
from fedray.files import as_json, read_json, write
from fedray.record.run import FAILED, RECORD, STOPPED, Run, environment
from fedray.scores.metrics import higher_is_better

RETRIES = 2  # of a trial that fails; it goes on from its last complete round


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its configuration, what of it the sweep set, and its directory."""

    config: Config
    changes: dict[str, Any]
    directory: Path


class Sweep(NamedTuple):
    """What became of a sweep: its complete runs; and by the name of their directory, why others are not complete."""

    runs: list[Run]
    stopped: dict[str, str]  # by ASHA
    missing: dict[str, str]


class News(NamedTuple):
    """What a sweep tells as it goes. `outcome`: waiting, running, complete, failed or stopped."""

    trial: Trial
    outcome: str
    rounds: int  # complete ones


def sweep(
    base: Config,
    space: Space,
    out: str | Path,
    *,
    name: str = "sweep",
    question: str = "",
    resume: bool = False,
    again: bool = False,
    asha: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    on_news: Callable[[News], None] = lambda news: None,
) -> Sweep:
    """Run every combination of a space's values, as many side by side as fit, each in a directory of its own in `out`.

    A directory's name ends in its configuration's hash, and a configuration that `out` already has is not run twice:
    sweeps may share `out` and so their runs. With `config.actors` None a trial gets a fair share of the machine: if
    that is no more than one actor, it trains its clients in its own process.

    Args:
        space: values by the name of a `Config` field, or "task.FIELD"; or a function of the configuration so far,
            for what follows from the names before it. Seeds are a dimension like others.
        name, question: what the record `out`/NAME.sweep.json says.
        resume: go on with a sweep that was stopped: complete trials are kept, others continue from their last round.
        again: run anew what `out` has already, beside it.
        asha: a score; trials that are behind in it after as many images trained are stopped early (Li et al. 2020,
            arXiv:1810.05934). Rounds would compare unequal work.

    Raises:
        UserError: what was asked for cannot be done; nothing was started.
        RunError: no trial could start. (A trial that fails is in `missing`.)
    """
    out = Path(out).absolute()
    configs = expand(base, space)
    for config in configs:
        try:
            config.check()
        except UserError as error:
            raise UserError(f"the trial {_name(settings_of(config, space))}: {error}") from None
        check_apart(out, config)
    if asha is not None and any(config.evaluate_every is None for config in configs):
        raise UserError("--asha stops trials by scores along the way: say --evaluate-every.")
    trials = _directories(configs, list(space), out, name, resume, again)
    dataset = base.task.dataset()  # decoded here, with progress, for all trials
    for trial in trials:
        if _settled(trial) and trial.config.task == base.task:
            Run(trial.directory).check_data({"images_sha256": dataset.sha256})
    for config in {trial.config.features: trial.config for trial in trials if not _settled(trial)}.values():
        if config.task == base.task:
            check_features(config, dataset)
    with connected(base.address):
        left = [trial for trial in trials if not _settled(trial)]
        left = [replace(trial, config=_with_actors(trial, len(left))) for trial in left]
        _record(out, name, question, trials)
        waiting = {trial.directory for trial in left}
        for trial in trials:
            rounds = len(Run(trial.directory).rows)
            on_news(News(trial, "waiting" if trial.directory in waiting else _outcome(trial), rounds))
        if left:
            _tune(left, len(dataset), asha, metrics or {}, on_news)
    found: dict[str, list[Trial]] = {"complete": [], "stopped": [], "failed": []}
    for trial in trials:
        found[_outcome(trial)].append(trial)
    stopped, missing = ({trial.directory.name: _why(trial) for trial in found[key]} for key in ("stopped", "failed"))
    return Sweep([Run.open(trial.directory) for trial in found["complete"]], stopped, missing)


def _name(changes: Mapping[str, Any]) -> str:
    """As a part of a path: `clients-4-seed-0`."""
    text = "-".join(f"{name.removeprefix('task.')}-{value}" for name, value in changes.items())
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:100] or "base"


def _directories(
    configs: list[Config], names: list[str], out: Path, name: str, resume: bool, again: bool
) -> list[Trial]:
    """Where each trial goes: where it was, if `out` has it. Raises `UserError`."""
    record = out / f"{name}{RECORD}"
    if resume and again:
        raise UserError("--resume and --again are both given; give one of them.")
    if resume and not record.exists():
        raise UserError(f"there is no sweep {name!r} in {out} to resume; leave --resume out, or name its --out.")
    if record.exists() and not (resume or again):
        raise UserError(f"{out} holds this sweep already; go on with it by --resume, or choose another --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a directory; choose another --out.")
    several = [name for name in names if len({str(settings_of(config, [name])) for config in configs}) > 1]
    before = [Path(trial["directory"]) for trial in read_json(record)["trials"]] if resume else []
    trials = []
    for config in configs:
        ending = "-" + config.sha256[:8]
        was = [path.name for path in before if ending in path.name] or sorted(
            path.name for path in out.glob(f"*{ending}*")
        )
        directory = was[0] if was and not again else _name(settings_of(config, several)) + ending
        if again and was:
            directory += f"-{len(was) + 1}"
        trials.append(Trial(config, settings_of(config, names), out / directory))
    lost = {path.name for path in before} - {trial.directory.name for trial in trials}
    if lost:
        raise UserError(
            f"the sweep in {out} has a trial {min(lost)}, which is not among those asked for now; a resumed sweep "
            f"keeps its settings (it may have more values)."
        )
    return trials


def _record(out: Path, name: str, question: str, trials: list[Trial]) -> None:
    """Write what is asked, before anything starts. Raises `UserError`."""
    names = list(trials[0].changes)
    varied = [name for name in names if len({json.dumps(trial.changes[name], default=str) for trial in trials}) > 1]
    varied.sort(key=lambda name: name == "seed")  # last
    asked = {
        "name": name,
        "question": question.strip(),
        **environment(),
        "varied": varied,
        "trials": [{"directory": trial.directory.name, "changes": trial.changes} for trial in trials],
    }
    record = out / f"{name}{RECORD}"
    if record.exists():  # what repeats the sweep is how it was begun
        asked |= {name: value for name, value in read_json(record).items() if name not in ("varied", "trials")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(record, as_json(asked))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out.") from None


def _settled(trial: Trial) -> bool:
    """Complete, or stopped early: nothing is left to do."""
    return Run(trial.directory).result is not None or (trial.directory / STOPPED).exists()


def _outcome(trial: Trial) -> str:
    if Run(trial.directory).result is not None:
        return "complete"
    return "stopped" if (trial.directory / STOPPED).exists() else "failed"


def _why(trial: Trial) -> str:
    """Why a run is not complete."""
    for name in (FAILED, STOPPED):
        if (trial.directory / name).exists():
            return (trial.directory / name).read_text().strip()
    return "it was not finished"


# Where trials run


def _with_actors(trial: Trial, trials: int) -> Config:
    """The trial's configuration with a number of actors: its share of the cluster, unless it says how many.

    0 is one trial in one process. Raises `UserError` if it does not fit, now or ever.
    """
    config = trial.config
    try:
        slots = count_slots(config)
    except UserError as error:
        raise UserError(f"the trial {trial.directory.name}: {error}") from None
    if config.actors is None:
        share = min(config.cohort_size, slots // trials)
        several = len([node for node in ray.nodes() if node["Alive"]]) > 1
        # The trial's own process stays on this node; an actor can be on any.
        return replace(config, actors=max(1, share) if several else share if share > 1 else 0)
    return replace(config, actors=min(config.actors, config.cohort_size))


def bundles(config: Config) -> list[dict[str, float]]:
    """What a trial needs: the driver's bundle (on this node, where the runs are), then one per actor."""
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    actor = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    return [here, *[actor] * config.actors] if config.actors else [here | actor]


def _tune(
    trials: list[Trial],
    examples: int,
    asha: str | None,
    metrics: Mapping[str, Metric],
    on_news: Callable[[News], None],
) -> None:
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
    train = tune.with_parameters(_train, trials=by_name, provenance=environment(), metrics=metrics, asha=asha)
    resources = tune.with_resources(
        train, lambda chosen: tune.PlacementGroupFactory(bundles(by_name[chosen["trial"]].config))
    )
    with tempfile.TemporaryDirectory(prefix="fedray-tune-") as scratch:  # all that matters is in the runs
        tuner = tune.Tuner(
            resources,
            param_space={"trial": tune.grid_search(list(by_name))},
            # A process is used again, but for one that ASHA may stop in the middle.
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=asha is None),
            run_config=tune.RunConfig(
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=[_Watch(by_name, on_news)],
                verbose=0,
            ),
        )
        try:
            results = tuner.fit()
        except TuneError as error:
            raise RunError(f"Ray Tune could not go on: {reason(error)}; resume the sweep.") from error
        for result in results:
            trial = by_name[result.config["trial"]]
            if result.error and not _settled(trial) and not (trial.directory / FAILED).exists():
                _leave(trial, FAILED, f"Ray Tune gave it up: {reason(result.error)}")


def _train(
    chosen: dict[str, Any], trials: dict[str, Trial], provenance: dict[str, Any], metrics: Any, asha: str | None
) -> None:
    """A trial, in its own process: the driver of a run that begins, or goes on from its last round."""
    trial = trials[chosen["trial"]]
    config, run = trial.config, Run(trial.directory)
    for name in (FAILED, STOPPED):
        (run.directory / name).unlink(missing_ok=True)
    begun = (run.directory / "config.json").exists()
    if not begun and run.directory.is_dir():
        for path in run.directory.glob(".config.json.*"):  # of one that was killed as it began
            path.unlink()
    try:
        if config.actors == 0:
            keep_to_fraction(config)
        images = sum(row["images"] for row in run.rows)
        dataset = config.task.dataset()
        with open_pool(config, dataset) as pool:
            rows = fit(
                config, pool, run.directory, resume=begun, provenance=provenance, metrics=metrics, dataset=dataset
            )
            for row in rows:
                images += row["images"]
                scores = {name: score["value"] for name, score in row["scores"].items()}
                if asha is not None and scores:
                    check_name("score", asha, scores)
                told = {"round": row["round"], "images": images, "loss": row["loss"]}
                # Nothing to stop a trial by once it has trained to its end: its model is yet to be saved.
                tune.report(told | (scores if row["round"] < config.rounds else {}))
    except Exception as error:
        kind = "" if isinstance(error, (UserError, RunError)) else f"{type(error).__name__}: "
        _leave(trial, FAILED, f"{kind}{error}")
        if not isinstance(error, UserError):  # which another try would not mend
            raise


def _leave(trial: Trial, name: str, why: str) -> None:
    """Leave a line in a trial's directory that says why it is not complete."""
    trial.directory.mkdir(parents=True, exist_ok=True)
    (trial.directory / name).write_text(f"{why}\n")


class _Watch(tune.Callback):
    """Passes on what happens to trials, and ends a sweep in which nothing can start."""

    def __init__(self, trials: dict[str, Trial], on_news: Callable[[News], None]) -> None:
        self.trials = trials
        self.on_news = on_news
        self.moved = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks, to restore a sweep; we do not restore it so

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if any(trial.status == "RUNNING" for trial in trials):
            self.moved = time.monotonic()
        elif time.monotonic() > self.moved + START_TIMEOUT:
            waiting = next(trial for trial in trials if not trial.is_finished())
            need = bundles(self.trials[waiting.config["trial"]].config)
            total = {name: sum(bundle.get(name, 0) for bundle in need) for name in ("CPU", "GPU")}
            raise RunError(
                f"no trial could start in {START_TIMEOUT:.0f} s. One needs {describe(total)}; free now: "
                f"{describe(ray.available_resources())}."
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "running", len(Run(self.trials[trial.config["trial"]].directory).rows))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trial, "running", result["round"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["trial"]]
        rounds = (trial.last_result or {}).get("round", 0)
        if Run(ours.directory).result is None and not (ours.directory / FAILED).exists():
            _leave(ours, STOPPED, f"ASHA stopped it after round {rounds}")
        self._tell(trial, _outcome(ours), rounds)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.trials[trial.config["trial"]]
        if not (ours.directory / FAILED).exists():
            _leave(ours, FAILED, "its process ended (killed, or out of memory)")
        self._tell(trial, "failed", (trial.last_result or {}).get("round", 0))

    def _tell(self, trial: Any, outcome: str, rounds: int) -> None:
        self.on_news(News(self.trials[trial.config["trial"]], outcome, rounds))
