"""A run: in this process, or by a driver actor that outlives it and can be attached to."""

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.cluster.actors import hide_gpus, make_options
from fedray.cluster.connection import CONNECT_TIMEOUT, NAMESPACE, connected, send_own_code
from fedray.cluster.ends import explain, last_line
from fedray.cluster.messages import Message, pack, unpack
from fedray.cluster.metrics import Metrics
from fedray.cluster.nodes import count_actors
from fedray.cluster.pool import POLL, RayPool
from fedray.cluster.versions import check_versions
from fedray.config import Config
from fedray.data.dataset import Dataset, Source
from fedray.errors import Detached, RunError, UserError
from fedray.federation.added import Added, Own
from fedray.federation.evaluation import Show
from fedray.federation.fit import fit, prepare
from fedray.federation.modes import plain
from fedray.federation.plan import Plan, disk_needed, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session
from fedray.memory import keep_freed_memory
from fedray.record.copies import local
from fedray.record.provenance import environment
from fedray.record.resume import check_resumable
from fedray.record.run import Row
from fedray.reports.progress import followed
from fedray.reports.run import Run
from fedray.storage import located, shown

LINGER = 60.0  # seconds that a driver keeps its last rows for a caller that may be gone


@dataclass(frozen=True)
class Request:
    """A run for a driver actor, worked out already: so it builds no network before the end.

    plan: the `Plan`, packed, without its dataset;  source: where on this node that is, if it is cached.
    """

    config: Config
    out: Path
    resume: bool
    provenance: dict[str, Any]
    added: Added
    source: Source | None
    plan: Message

    @classmethod
    def of(
        cls,
        config: Config,
        out: Path,
        resume: bool,
        provenance: dict[str, Any],
        added: Added,
        plan: Plan,
    ) -> "Request":
        # Without its dataset it is no whole `Plan`; `unpacked` makes it one again.
        packed = pack(replace(plan, dataset=None))  # type: ignore[arg-type]
        return cls(config, out, resume, provenance, added, plan.dataset.source, packed)

    def unpacked(self) -> Plan:
        """Return the plan, with its dataset."""
        dataset = self.config.task.dataset() if self.source is None else Dataset.open(self.source.place)
        return replace(unpack(self.plan), dataset=dataset)


class DriverActor:
    """An actor that runs the federation. Detached: on a running cluster it outlives the process that started it."""

    def __init__(self) -> None:
        keep_freed_memory()
        hide_gpus()
        self.rows: list[Row] = []
        self.phase: tuple[str, float, float] = ("starting", 0, 1)
        self.finished = False
        self.error: Exception | None = None

    def run(self, request: Request, watched: bool) -> None:
        """Do a run; its numbers are offered to Prometheus where it is `watched`."""
        config = request.config
        try:
            plan = request.unpacked()
            run = Run(request.out)
            pool = RayPool.start(config, plan.dataset, run.rows if request.resume else (), str(request.out))
            try:
                plan = prepare(config, run, request.resume, plan=plan)
                added = request.added.beside(Metrics(str(request.out))) if watched else request.added
                session = Session(config, plan, pool, run, self._show, added)
                for row in fit(session, request.provenance, request.resume):
                    self.rows.append(row)
            finally:
                pool.close()
        except (UserError, RunError) as error:
            self.error = error
        except Exception as error:
            self.error = RunError(f"{type(error).__name__}: {error}")
            self.error.add_note(traceback.format_exc())
        self.finished = True
        time.sleep(LINGER)  # a caller that is still there ends this process sooner
        os._exit(0)

    def poll(self, after: int) -> tuple[list[Row], tuple[str, float, float], bool, Exception | None]:
        """Return the rows after the first `after`, the current phase, whether the run is over, and its error if any."""
        finished, error = self.finished, self.error
        return self.rows[after:], self.phase, finished, error

    def _show(self, phase: str, done: float, total: float) -> None:
        self.phase = (phase, done, total)


@plain()
def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    on_row: Callable[[Row], None] | None = None,
    show: Show | None = None,
    dataset: Dataset | None = None,
    **own: Unpack[Own],
) -> Run:
    """Train a model, in this process (`config.actors` 0) or on Ray, and return its run directory.

    Rows go to `on_row` as rounds complete, progress to `show`, both in this process; without either, a terminal or
    notebook shows a progress bar. With `resume`, a stopped run
    in `out` continues from its last complete round; if it is still running on the cluster, we attach to it. `out` may
    be a URL, as s3://bucket/run: then the run is written in a copy of it on this node, and each round counts when it is
    in that storage.
    `dataset` is the task's, if it is loaded already.

    Args:
        own: `metrics`, `callbacks` and `report_to`, as `Own` says.

    Raises:
        UserError: the request cannot be carried out; nothing was written, unless the clients then do not fit on a GPU.
        RunError: the run could not continue; resume it.
        Detached: it was interrupted, and the run goes on on the cluster that it had joined.
    """
    config.check()
    provenance, added = environment(), Added.of(own)
    if resume:
        begun = Run.open(out, config)
        check_resumable(begun, config)
        if begun.complete_after(config.rounds):
            return begun
        out = begun.directory.absolute()
    else:
        out = local(out).absolute()
        check_outside_images(out, config)
        Run(out).check_vacant()
    dataset = config.task.dataset() if dataset is None else dataset
    with followed(config.rounds, on_row, show, out) as (on_row, show):
        if config.actors == 0:
            plan = prepare(config, Run(out), resume, dataset)
            session = Session(config, plan, LocalPool(config, dataset), Run(out), show, added)
            for row in fit(session, provenance, resume):
                on_row(row)
        else:
            plan = make_plan(config, dataset)  # mistakes are told, and images decoded, before Ray starts
            plan.check(config)
            Run(out).check_disk(disk_needed(config, plan))
            with connected(config.address) as private:
                _drive(Request.of(config, out, resume, provenance, added, plan), private, on_row, show)
    return Run.open(shown(out), config)


def check_outside_images(out: Path, config: Config) -> None:
    """Raise `UserError` if a run would put its pictures among the images it learns from."""
    folder = getattr(config.task, "train_data_dir", None)
    if folder is not None and out.resolve().is_relative_to(located(folder).resolve()):
        raise UserError(
            f"--out {shown(out)} lies below --train-data-dir {folder}, where the run's pictures would become images to "
            f"learn from; choose another --out."
        )


def _drive(request: Request, private: bool, on_row: Callable[[Row], None], show: Show) -> None:
    """Start the run's driver actor, or attach to it, and pass on what it reports until the run is over."""
    count_actors(request.config)
    check_versions(request.config.node_label)
    out, name = request.out, f"driver:{shown(request.out)}"
    driver = _find_driver(name, request.config.start_timeout)
    if driver is not None and not request.resume:
        raise UserError(
            f"a run with the directory {shown(out)} is still going on this cluster; attach to it with --resume, or "
            f"choose another --out."
        )
    if driver is not None and Run.open(out).saved["config"]["rounds"] != request.config.rounds:
        asked = "ask for other --rounds when it is over"
        raise UserError(f"the run at {shown(out)} is still going on this cluster; {asked}.")
    started = None  # of a driver that was there already, another process knows
    if driver is None:
        send_own_code()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        detached = make_options(0, 0) | {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        # On this node, since the run directory is; two threads, to answer while it runs.
        driver = ray.remote(max_concurrency=2, scheduling_strategy=here, **detached)(DriverActor).remote()
        started = driver.run.remote(request, not private)
    try:
        _follow(request, driver, started, on_row, show)
    except KeyboardInterrupt:
        if private:
            raise
        where = f"the run in {shown(out)} goes on on its Ray cluster"
        raise Detached(f"{where}; resuming it there attaches to it") from None


def _follow(request: Request, driver: Any, started: Any, on_row: Callable[[Row], None], show: Show) -> None:
    """Pass on what a driver actor reports until the run is over; `started` is its call, where we have made it."""
    out, seen, finished, error = request.out, 0, False, None
    while not finished:
        try:
            report = driver.poll.remote(seen)
            rows, phase, finished, error = ray.get(report, timeout=request.config.start_timeout)
        except GetTimeoutError:
            raise RunError(f"the driver actor of {shown(out)} does not answer; {_go_on(out)}.") from None
        except RayError as died:
            raise RunError(f"the driver actor of {shown(out)} died: {explain(died)}; {_go_on(out)}.") from None
        for row in rows:
            on_row(row)
        seen += len(rows)
        show(*phase)
        if not finished:
            if started is not None:
                _check_begun(started, driver, out)
            time.sleep(POLL)
    ray.kill(driver)
    if error is not None:
        raise error


def _go_on(out: Path) -> str:
    """Say how a run that was cut short is continued; one that was not begun yet is none."""
    return "resume the run" if (out / "config.json").exists() else "it had not begun: start it again"


def _check_begun(started: Any, driver: Any, out: Path) -> None:
    """Raise `RunError` if the run ended before it could say so: its driver could not read what it was given."""
    if not ray.wait([started], timeout=0)[0]:
        return
    try:
        ray.get(started, timeout=CONNECT_TIMEOUT)
    except (RayActorError, OutOfMemoryError):
        return  # it ended; the next poll tells why
    except RayError as error:
        ray.kill(driver)
        raise RunError(
            f"the driver actor of {shown(out)} could not begin: {last_line(error)}. Classes of your own must be in a "
            f"file that its process can import, or in the script that calls fedray.run."
        ) from None


def _find_driver(name: str, timeout: float) -> Any:
    """Find the driver actor of that name, if its run still goes on; remove one whose run is over."""
    try:
        driver = ray.get_actor(name, NAMESPACE)
        finished = ray.get(driver.poll.remote(0), timeout=timeout)[2]
    except (ValueError, RayActorError, OutOfMemoryError):
        return None
    if finished:
        ray.kill(driver)
        _wait_until_gone(name, timeout)
    return None if finished else driver


def drivers(address: str) -> list[tuple[str, str, int]]:
    """Return the runs that go on on a cluster: the directory of each, its phase, and its complete rounds."""
    found = []
    with connected(address):
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith("driver:"):
                with suppress(ValueError, RayError):  # one that ends just now
                    poll = ray.get_actor(actor["name"], NAMESPACE).poll.remote(0)
                    rows, phase, finished, _ = ray.get(poll, timeout=CONNECT_TIMEOUT)
                    if not finished:
                        found.append((actor["name"].removeprefix("driver:"), phase[0], len(rows)))
    return found


def _wait_until_gone(name: str, timeout: float) -> None:
    """Wait until Ray has removed a killed actor's name. Raises `RunError` if it does not."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            ray.get_actor(name, NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
    raise RunError(f"the actor {name} was killed and does not go away.")
