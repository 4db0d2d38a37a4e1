"""The work that a process does: local training of one client, and a batch of samples. Knows nothing of Ray."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from fedray.codecs import Payload
from fedray.config import Config
from fedray.data import Dataset
from fedray.seeds import generator, number
from fedray.tasks import Learner
from fedray.vector import as_tensor

Memory = dict[str, np.ndarray]  # what a client keeps from round to round: its optimizer's state


@dataclass(frozen=True, eq=False)
class TrainJob:
    """Train one client in one round. Idempotent: the same job gives the same bits wherever it runs."""

    round: int
    client: int
    indices: np.ndarray  # int64 [examples], into the dataset
    memory: Memory | None = None

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("train", self.round, self.client)

    def __str__(self) -> str:
        return f"client {self.client} in round {self.round}"


@dataclass(frozen=True)
class SampleJob:
    """Generate one batch of images."""

    batch: int
    size: int
    sampler: str
    steps: int
    seed: int

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("sample", self.batch)

    def __str__(self) -> str:
        return f"batch {self.batch} of the samples"


class Worker:
    """What a process needs for its jobs, built once: the learner on its device, and the data."""

    def __init__(self, config: Config, device: torch.device, name: str) -> None:
        self.config = config
        self.name = name
        self.learner = build(config, device)
        self.steps_done = 0  # optimizer steps and sampled batches since the process started
        self.on_step: Callable[[int], None] = lambda steps_done: None

    def step(self) -> None:
        """Count one step, for the progress bar."""
        self.steps_done += 1
        self.on_step(self.steps_done)

    @cached_property
    def dataset(self) -> Dataset:
        return self.config.task.dataset()


Work = Callable[[Worker, Any, Any], tuple[dict[str, Any], Any]]


def build(config: Config, device: torch.device) -> Learner:
    """The task's learner with the run's initial weights, the same in every process."""
    with _seeded(config.seed, "init"):
        return config.task.build(device)


def client_update(worker: Worker, model: Payload, job: TrainJob) -> tuple[dict[str, Any], tuple[Payload, Any]]:
    """Local training (McMahan et al. 2017, algorithm 1, ClientUpdate; AdamW in place of SGD).

    Returns the client's row, and its payload with what it keeps for its next round.

    Raises:
        ValueError: the client has no examples.
        FloatingPointError: the trained weights are not finite.
    """
    config, learner = worker.config, worker.learner
    flat, examples = learner.flat, len(job.indices)
    if examples == 0:
        raise ValueError("the client holds no examples")
    start = config.codec.decode_model(model)
    flat.check()
    flat.vector.detach().copy_(start)
    optimizer = torch.optim.AdamW(
        [flat.vector],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    if job.memory is not None:
        device = flat.vector.device
        optimizer.state[flat.vector] = {
            name: as_tensor(array).to(device, copy=True) for name, array in job.memory.items()
        }
    images = torch.from_numpy(worker.dataset.images[job.indices])
    labels = worker.dataset.labels
    columns = {"images": images} if labels is None else {
        "images": images, "labels": torch.from_numpy(labels[job.indices])
    }  # fmt: skip
    steps = config.steps(examples)
    learning_rate = lr_schedule(config, steps)
    rng = generator(config.seed, *job.key)
    loss_sum = torch.zeros((), device=flat.vector.device)
    images_seen = 0
    for step, indices in enumerate(batches(examples, config.train_batch_size, steps, rng)):
        optimizer.param_groups[0]["lr"] = learning_rate(job.round * steps + step)
        loss = learner.loss({name: column[indices] for name, column in columns.items()}, rng)
        flat.gradient.zero_()
        loss.backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([flat.vector], config.max_grad_norm)
        optimizer.step()
        loss_sum += loss.detach()
        images_seen += len(indices)
        worker.step()
    flat.check()
    trained = flat.vector.detach().to("cpu", copy=True)
    if not torch.isfinite(trained).all():
        raise FloatingPointError("the trained weights are not finite (lower the learning rate?)")
    memory = None
    if config.keep_optimizer:
        memory = {name: value.cpu().numpy() for name, value in optimizer.state[flat.vector].items()}
    payload = config.codec.encode_update(trained, start)
    row = {
        "client": job.client, "examples": examples, "steps": steps, "images": images_seen,
        "loss": loss_sum.item() / steps, "bytes_up": payload.nbytes,
    }  # fmt: skip
    return row, (payload, memory)


def sample_batch(worker: Worker, model: np.ndarray, job: SampleJob) -> tuple[dict[str, Any], np.ndarray]:
    """One batch of images, uint8 [size, channels, height, width], from the model (a float32 vector)."""
    worker.learner.flat.vector.detach().copy_(as_tensor(model))
    images = worker.learner.sample(job.size, generator(job.seed, *job.key), job.sampler, job.steps)
    worker.step()
    return {}, images.numpy()


def batches(examples: int, size: int, steps: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Indices of `steps` batches: epoch after epoch, each in a new order; an epoch's last may be smaller."""
    while True:
        for indices in torch.randperm(examples, generator=rng).split(size):
            if steps == 0:
                return
            yield indices
            steps -= 1


def lr_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Learning rate at a step of the whole run (round × local steps + local step), by diffusers' schedules."""
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(config.lr_scheduler, dummy, num_warmup_steps=0, num_training_steps=config.rounds * steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def do(worker: Worker, work: Work, shared: Any, job: Any) -> tuple[dict[str, Any], Any]:
    """Do one job; a failure is a row with an error, never an exception.

    Threads and torch's global generator (dropout draws from it) are set for the job and restored after it.
    """
    started = time.perf_counter()
    try:
        with threads(worker.config.threads), _seeded(worker.config.seed, "global", *job.key):
            row, payload = work(worker, shared, job)
    except Exception as error:
        row, payload = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}, None
    return row | {"actor": worker.name, "seconds": time.perf_counter() - started}, payload


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads: float sums depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(seed: int, *key: str | int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(number(seed, *key))
        yield
