"""A rehearsal: how long a client and its samples take on the machine at hand, and in how much memory."""

import heapq
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fedray.config import Config
from fedray.errors import RunError
from fedray.federation.blocks import TrainBlock, train_block
from fedray.federation.cohort import cohort_of
from fedray.federation.evaluation import scored
from fedray.federation.local import TrainJob
from fedray.federation.plan import Plan, machine_memory
from fedray.federation.pool import Pool, failure
from fedray.federation.sampling import SampleJob, sample_batch
from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row

TIMED = 2.0  # seconds of steps that are timed, where a client makes so many
SECONDS = ("client_seconds", "step_seconds", "batch_seconds", "denoising_seconds")
SAMPLED = "rehearsal/model"  # the model to sample from, beside what goes down
SPARE = 1.1  # of the memory that was measured, for a client that needs a little more
DENOISING = (2, 6)  # steps of a batch of samples that are timed, where an image takes so many


@dataclass(frozen=True, eq=False)
class RehearsalJob:
    """A job to train a client with one step and with more, and so to sample a batch; all is thrown away."""

    train: TrainJob
    steps: int
    sample: SampleJob | None
    number: int

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("rehearsal", self.number)

    def __str__(self) -> str:
        return f"the rehearsal of {self.train}"


class Rehearsal(NamedTuple):
    """What was measured: seconds, and bytes of a process at its most."""

    client: float  # of a client, beyond its steps
    step: float
    batch: float  # of a batch of samples, beyond its denoising steps
    denoising: float  # a denoising step of a batch
    memory: int  # of the process; of its GPU, where it has one
    fit: int  # such processes that fit into that memory
    workers: int
    seconds: float  # that it took


def rehearse(worker: Worker, shared: Shared, job: RehearsalJob) -> tuple[Row, None]:
    """Measure one client and one batch, in a process that then has everything it needs."""
    arrays = dict(shared.arrays)
    model = Shared({"model": arrays.pop(SAMPLED)})
    down = Shared(arrays, shared.about)

    def client(steps: int) -> float:
        config, worker.config = worker.config, replace(worker.config, local_steps=steps, local_epochs=None)
        try:
            _, parts = train_block(worker, down, TrainBlock((job.train,)))
        finally:
            worker.config = config
        row: Row = parts.now.rows[0] if parts else {"error": "its GPU broke"}
        if "error" in row:
            raise RunError(row["error"])
        return float(row["seconds"])

    def batch(steps: int) -> float:
        assert job.sample is not None
        began = time.perf_counter()
        sample_batch(worker, model, replace(job.sample, steps=steps))
        return time.perf_counter() - began

    client(1)  # builds the network, opens the data, makes the kernels
    fixed, step = _line(client, 1, max(1, min(job.steps, int(TIMED / client(1)) + 1)))
    row = {"client_seconds": fixed, "step_seconds": step}
    if job.sample is not None:
        batch(1)
        few, more = (min(job.sample.steps, steps) for steps in DENOISING)
        row["batch_seconds"], row["denoising_seconds"] = _line(batch, few, more)
    if worker.device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_reserved(worker.device)
        free, in_all = torch.cuda.mem_get_info(worker.device)
        beside = in_all - free - torch.cuda.memory_reserved(worker.device)  # the context, and what other programs hold
        row["fit"] = int(in_all / (SPARE * row["memory"] + beside))
    else:
        row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row["fit"] = int(machine_memory() / (SPARE * row["memory"]))
    return row, None


def _line(seconds: Callable[[int], float], few: int, more: int) -> tuple[float, float]:
    """Return a and b of seconds(steps) = a + b · steps, from two measurements; (0, b) from one."""
    short = seconds(few)
    if more == few:
        return 0.0, short / few
    slope = max(0.0, (seconds(more) - short) / (more - few))
    return max(0.0, short - few * slope), slope


def measure(config: Config, plan: Plan, pool: Pool) -> Rehearsal:
    """Have every process of a pool rehearse at the same time, and return the means, and the largest memory.

    Raises:
        UserError, RunError: a client cannot be trained, or its model not sampled, as it would be in the run.
    """
    method = config.method
    round = plan.round(config, 0)
    if not round.cohort:  # as Poisson cohorts may be
        round = replace(round, cohort=(0,), weights={0: 1})
    largest = max(round.cohort, key=lambda client: len(plan.shards[client]))
    down = config.links.send(method.broadcast(method.init(plan.initial, plan.layout), round), round)
    train = TrainJob(0, largest, plan.shards[largest], plan.held_out[largest])
    sample = None
    if config.evaluate_samples:
        sampling = scored(config, config.evaluate_samples, plan.dataset)
        sample = next(sampling.jobs(config.features is not None, 0))
    steps = config.steps(len(train.indices))
    shared = Shared({**down, SAMPLED: plan.initial.numpy()}, round)
    jobs = [RehearsalJob(train, steps, sample, number) for number in range(pool.workers)]
    rows = []
    for reply in pool.map(rehearse, shared, jobs, lambda done: None):
        if reply.lost or not reply.ok:
            why = reply.lost or reply.row["error"]
            raise failure(f"{reply.job} failed: {why}.", reply.row.get("error", ""), reply.row.get("trace", ""))
        rows.append(reply.row)
    client, step, batch, denoising = (sum(row.get(name, 0.0) for row in rows) / len(rows) for name in SECONDS)
    memory, seconds = (max(row[name] for row in rows) for name in ("memory", "seconds"))
    fit = min(row["fit"] for row in rows)
    return Rehearsal(client, step, batch, denoising, memory, fit, len(rows), seconds)


class Prediction(NamedTuple):
    """Seconds of a run, beyond its start."""

    training: float
    evaluation: float
    round: float  # of one round, its training alone


def predict(config: Config, plan: Plan, measured: Rehearsal) -> Prediction:
    """Work out how long a run will take, from what a rehearsal measured.

    The clients of a round are dealt to processes as in a run, each to the one that is free first; so are batches of
    samples. What the driver does between rounds is not in it.
    """
    rounds = [
        _longest(
            [
                measured.client + config.steps(len(plan.shards[client])) * measured.step
                for client in cohort_of(config, n)
            ],
            measured.workers,
        )
        for n in range(config.rounds)
    ]
    scored = [number for number in range(1, config.rounds + 1) if config.evaluates(number)]
    sets = len(scored) + (config.evaluate_repeats - 1 if scored else 0)
    full, rest = divmod(config.evaluate_samples, config.eval_batch_size)
    batch = measured.batch + config.sampling_steps * measured.denoising
    batches = [batch] * full + [batch * rest / config.eval_batch_size] * (rest > 0)
    if not full:  # the batch that was measured is smaller
        batches = [batch] * (rest > 0)
    return Prediction(sum(rounds), sets * _longest(batches, measured.workers), max(rounds, default=0.0))


def _longest(durations: Iterable[float], workers: int) -> float:
    """Return when the last of some jobs ends, of which each begins where a worker is free first."""
    ends = [0.0] * workers
    for duration in durations:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)
