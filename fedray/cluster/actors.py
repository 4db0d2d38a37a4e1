"""Ray: client actors that do jobs, a driver actor that runs the federation, and `run`, which starts both."""

import dataclasses
import math
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.config import Config
from fedray.data.dataset import Dataset, Source
from fedray.errors import RunError, UserError
from fedray.federation.evaluation import Metric, Show, silent
from fedray.federation.fit import fit, prepare
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool, Pool, Progress, Reply
from fedray.federation.round import Session
from fedray.federation.worker import Shared, Work, Worker, do
from fedray.record.provenance import environment
from fedray.record.resume import check_resumable
from fedray.record.run import Row, Run

NAMESPACE = "fedray"
TOKEN = secrets.token_hex(32)  # of a private Ray; Ray reads it once per process
START_TIMEOUT = 180.0  # seconds for actors to start: they import torch, on a cold disk one after the other
CONNECT_TIMEOUT = 10.0  # seconds for a cluster to answer at its address
TRANSFER_TIMEOUT = 600.0  # seconds for one payload to reach the driver
POLL = 0.5  # seconds between looks at the progress of running jobs
LINGER = 60.0  # seconds that a driver keeps its last rows for a caller that may be gone


class ClientActor:
    """A process with a fraction of the machine that does one job at a time."""

    def __init__(self, config: Config, index: int, source: Source | None, sha256: str | None) -> None:
        device = torch.device("cuda" if config.gpus_per_actor else "cpu")
        keep_to_fraction(config)
        self.worker = Worker(config, device, f"actor {index}", source, sha256)

    @ray.method(num_returns=2)
    def do(self, work: Work, job: Any, about: Any, names: tuple[str, ...], *arrays: np.ndarray) -> tuple[Row, Any]:
        return do(self.worker, work, Shared(dict(zip(names, arrays, strict=True)), about), job)

    @ray.method(concurrency_group="progress")
    def steps_done(self) -> int:
        return self.worker.steps_done


def keep_to_fraction(config: Config) -> None:
    """Hold this process to its share of a GPU's memory: the fraction that Ray counts is bookkeeping only."""
    if 0 < config.gpus_per_actor < 1:
        torch.cuda.set_per_process_memory_fraction(config.gpus_per_actor)


class RayPool:
    """Jobs on client actors, one at a time each.

    At most `window` jobs are drawn and not yet passed by: an early reply waits in the object store for the
    oldest, so this bounds what the store holds. Jobs start in order, so the oldest is always running or done,
    and the window cannot block.
    """

    def __init__(self, actors: list[Any], timeout: float) -> None:
        self.actors = actors
        self.window = 2 * len(actors)
        self.timeout = timeout
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}  # arrays that have been put, and where they are, by name

    @classmethod
    def start(cls, config: Config, dataset: Dataset | None = None) -> "RayPool":
        """Start the actors; they open `dataset` where their node has it.

        Raises:
            UserError: they do not fit.
            RunError: they do not start.
        """
        count = count_actors(config)
        options = _options(config.cpus_per_actor, config.gpus_per_actor)
        client = ray.remote(concurrency_groups={"progress": 1}, **options)(ClientActor)
        data = (None, None) if dataset is None else (dataset.source, dataset.sha256)
        pool = cls([client.remote(config, index, *data) for index in range(count)], config.client_timeout)
        try:
            ray.get([actor.__ray_ready__.remote() for actor in pool.actors], timeout=START_TIMEOUT)
        except GetTimeoutError:
            pool.close()
            raise RunError(
                f"{count} client actors did not start in {START_TIMEOUT:.0f} s. They need {_need(config, count)}; "
                f"free now: {describe(ray.available_resources())}."
            ) from None
        except RayError as error:
            pool.close()
            raise RunError(f"a client actor could not start: {_reason(error)}.") from None
        return pool

    def apart(self) -> list["RayPool"]:
        return [RayPool([actor], self.timeout) for actor in self.actors]

    def map(self, work: Work, shared: Any, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        about = ray.put(shared.about)
        names, arrays = tuple(shared.arrays), [self._put(name, array) for name, array in shared.arrays.items()]
        queue = enumerate(jobs)
        idle = list(self.actors)
        running: dict[Any, _Running] = {}
        begin = self._steps_done()
        looked = time.monotonic()
        oldest, drawn, done = 0, 0, set()  # `done` holds indices above `oldest`
        while True:
            while idle and drawn < oldest + self.window:
                item = next(queue, None)
                if item is None:
                    break
                index, job = item
                drawn = index + 1
                actor = idle.pop()
                row, payload = actor.do.remote(work, job, about, names, *arrays)
                running[row] = _Running(index, job, payload, actor, time.monotonic() + self.timeout)
            if not running:
                return
            ready, _ = ray.wait(list(running), timeout=POLL, fetch_local=False)
            for ref in ready:
                call = running.pop(ref)
                row = _fetch(ref, str(call.job))
                idle.append(call.actor)
                done.add(call.index)
                while oldest in done:
                    done.remove(oldest)
                    oldest += 1
                yield Reply(call.index, call.job, row, _Fetch(call.payload, str(call.job)))
            for call in running.values():
                if time.monotonic() > call.deadline:
                    raise RunError(f"{call.job} has not answered for {self.timeout:.0f} s (--client-timeout).")
            if time.monotonic() > looked + POLL:
                progress(self._steps_done() - begin)
                looked = time.monotonic()

    def _put(self, name: str, array: np.ndarray) -> Any:
        """Put an array into the object store, unless it is the last one of that name that was."""
        sent = self._sent.get(name)
        # The array that was put is held, so another at its address is the same.
        if sent is None or sent[0].ctypes.data != array.ctypes.data or sent[0].nbytes != array.nbytes:
            sent = self._sent[name] = (array, ray.put(array))
        return sent[1]

    def _steps_done(self) -> int:
        counts = [actor.steps_done.remote() for actor in self.actors]
        return sum(_fetch(count, f"its progress (actor {index})") for index, count in enumerate(counts))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


@dataclasses.dataclass
class _Running:
    index: int
    job: Any
    payload: Any
    actor: Any
    deadline: float


@dataclasses.dataclass
class _Fetch:
    """Brings a payload here, when it is asked for."""

    ref: Any
    job: str

    def __call__(self) -> Any:
        return _fetch(self.ref, self.job)


def _fetch(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref, timeout=TRANSFER_TIMEOUT)
    except GetTimeoutError:
        raise RunError(f"the result of {what} did not arrive in {TRANSFER_TIMEOUT:.0f} s.") from None
    except RayActorError as error:
        raise RunError(f"the client actor doing {what} died: {_reason(error)}.") from None
    except RayError as error:
        raise RunError(f"the result of {what} is lost: {_reason(error)}.") from None


def _reason(error: RayError) -> str:
    """The line of a Ray error that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and "creation" not in str(error):
        return "its process ended (killed, or out of memory)"
    return lines[-1].rstrip(".") if lines else type(error).__name__


def _options(cpus: float, gpus: float) -> dict[str, Any]:
    # Ray no longer hides GPUs from an actor that asked for none.
    hidden = {} if gpus else {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
    # No restarts: Ray's own lose the actor's state and may run a call twice.
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, **hidden}


def count_actors(config: Config) -> int:
    """How many client actors a run gets: as many as asked for or as fit, never more than the cohort.

    Raises:
        UserError: the cluster has no GPU, or is too small.
    """
    slots = count_slots(config)
    return min(config.actors or slots, config.cohort_size)


def count_slots(config: Config) -> int:
    """How many client actors fit into the cluster.

    Raises:
        UserError: fewer than asked for, or none.
    """
    have = ray.cluster_resources()
    gpus, cpus = have.get("GPU", 0), have.get("CPU", 0)
    if config.gpus_per_actor and not gpus:
        raise UserError(f"--gpus-per-actor {config.gpus_per_actor:g}: this machine (or cluster) has no GPU.")
    fit_cpu = math.floor(cpus / config.cpus_per_actor + 1e-9)
    fit_gpu = gpus * math.floor(1 / config.gpus_per_actor + 1e-9) if 0 < config.gpus_per_actor < 1 else math.inf
    if config.gpus_per_actor >= 1:
        fit_gpu = gpus // config.gpus_per_actor
    slots = int(min(fit_cpu, fit_gpu))
    wanted = config.actors or 1
    if wanted > slots:
        raise UserError(
            f"--actors {wanted} needs {_need(config, wanted)}, and there are {describe(have)}: at most {slots} "
            f"fit. Ask for fewer, or lower --cpus-per-actor or --gpus-per-actor."
        )
    return slots


def _need(config: Config, count: int) -> str:
    gpus = f" and {count * config.gpus_per_actor:g} GPUs" if config.gpus_per_actor else ""
    return f"{count * config.cpus_per_actor:g} CPUs{gpus}"


def describe(have: Mapping[str, float]) -> str:
    """CPUs and GPUs, in words."""
    return f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"


class DriverActor:
    """Runs the federation. Detached: on a running cluster it outlives the process that started it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.phase: tuple[str, float, float] = ("starting", 0, 1)
        self.finished = False
        self.error: Exception | None = None

    def run(
        self,
        config: Config,
        out: Path,
        resume: bool,
        provenance: dict[str, Any],
        metrics: Mapping[str, Metric],
        source: Source | None,
    ) -> None:
        try:
            dataset = config.task.dataset() if source is None else Dataset.open(source.place)
            pool = RayPool.start(config, dataset)
            try:
                plan = prepare(config, Run(out), resume, dataset)
                session = Session(config, plan, pool, Run(out), self._show, metrics)
                for row in fit(session, provenance, resume):
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
        """Rows after the first `after`, what it is doing, whether it has finished, and why it could not."""
        finished, error = self.finished, self.error
        return self.rows[after:], self.phase, finished, error

    def _show(self, phase: str, done: float, total: float) -> None:
        self.phase = (phase, done, total)


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
    show: Show = silent,
    metrics: Mapping[str, Metric] | None = None,
    dataset: Dataset | None = None,
) -> Run:
    """Train: the whole run, in this process (`config.actors` 0) or on Ray. Returns its directory, opened.

    Rows go to `on_row` as rounds complete, progress to `show`. `metrics` are scores of your own, by name: functions
    of (samples, the dataset's images), both uint8 [n, c, h, w], that give a number. With `resume`, a stopped run in
    `out` goes on from its last complete round, and a run that is still going on the cluster is attached to.
    `dataset` is the task's, if it is loaded already.

    Raises:
        UserError: what was asked for cannot be done; nothing was written.
        RunError: the run could not go on; resume it.
    """
    config.check()
    out = Path(out).absolute()
    provenance = environment()
    if resume:
        check_resumable(Run.open(out), config)
        if Run(out).result is not None:
            return Run.open(out)
    else:
        check_apart(out, config)
        Run(out).check_vacant()
    dataset = config.task.dataset() if dataset is None else dataset
    if config.actors == 0:
        plan = prepare(config, Run(out), resume, dataset)
        session = Session(config, plan, LocalPool(config, dataset), Run(out), show, metrics or {})
        for row in fit(session, provenance, resume):
            on_row(row)
    else:
        plan = make_plan(config, dataset)  # mistakes are told, and images decoded, before Ray starts
        Run(out).check_disk(config, plan.layout)
        with connected(config.address):
            _drive(config, out, resume, provenance, on_row, show, metrics or {}, dataset.source)
    return Run.open(out)


def check_apart(out: Path, config: Config) -> None:
    """Raise `UserError` if a run would put its pictures among the images it learns from."""
    folder = getattr(config.task, "train_data_dir", None)
    if folder is not None and out.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(
            f"--out {out} lies below --train-data-dir {folder}, where the run's pictures would become images to learn "
            f"from; choose another --out."
        )


def _drive(
    config: Config,
    out: Path,
    resume: bool,
    provenance: dict[str, Any],
    on_row: Callable[[Row], None],
    show: Show,
    metrics: Mapping[str, Metric],
    source: Source | None,
) -> None:
    """Start the run's driver actor (or attach to it), and pass on what it reports until it has finished."""
    count_actors(config)
    name = f"driver:{out}"
    driver = _find_driver(name)
    if driver is not None and not resume:
        raise UserError(
            f"a run with the directory {out} is still going on this cluster; attach to it with --resume, or choose "
            f"another --out."
        )
    if driver is None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = _options(0, 0) | {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
        # On this node, since the run directory is; two threads, to answer while it runs.
        driver = ray.remote(max_concurrency=2, scheduling_strategy=here, **options)(DriverActor).remote()
        driver.run.remote(config, out, resume, provenance, metrics, source)
    seen, finished, error = 0, False, None
    while not finished:
        try:
            rows, phase, finished, error = ray.get(driver.poll.remote(seen), timeout=START_TIMEOUT)
        except GetTimeoutError:
            raise RunError(f"the driver actor of {out} does not answer; resume the run.") from None
        except RayActorError as died:
            raise RunError(f"the driver actor of {out} died: {_reason(died)}; resume the run.") from None
        for row in rows:
            on_row(row)
        seen += len(rows)
        show(*phase)
        if not finished:
            time.sleep(POLL)
    ray.kill(driver)
    if error is not None:
        raise error


def _find_driver(name: str) -> Any:
    """The driver actor of that name, if it is still at work. One that has finished is removed."""
    try:
        driver = ray.get_actor(name, NAMESPACE)
        finished = ray.get(driver.poll.remote(0), timeout=START_TIMEOUT)[2]
    except (ValueError, RayActorError):
        return None
    if finished:
        ray.kill(driver)
        _wait_until_gone(name)
    return None if finished else driver


def _wait_until_gone(name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        try:
            ray.get_actor(name, NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
    raise RunError(f"the actor {name} was killed and does not go away.")


@contextmanager
def open_pool(config: Config, dataset: Dataset | None = None) -> Iterator[Pool]:
    """The pool that the configuration asks for, for jobs outside of a run."""
    if config.actors == 0:
        yield LocalPool(config, dataset)
        return
    with connected(config.address):
        pool = RayPool.start(config, dataset)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray, for the time of the block: the cluster at `address` (or RAY_ADDRESS), else a private one.

    Ray that this process has already started is used as it is, and left running.

    Raises:
        UserError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray listens on every interface of the machine and asks for a token, unless told otherwise: one that only
        # this process and its actors know, in place of a file in the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", TOKEN)
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        try:
            if ":" in address:  # Ray would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--address {address}: no Ray cluster could be joined there ({reason}). Start one with "
                f"`ray start --head`, or leave --address out for a private one."
            ) from None
    try:
        yield
    finally:
        ray.shutdown()
