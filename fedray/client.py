"""The jobs that a process does: local training of a client, samples, features. Knows nothing of Ray."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from fedray.codecs import Payload
from fedray.config import Config
from fedray.data import Dataset, Source
from fedray.scores import networks
from fedray.scores.nearest import nearest
from fedray.seeds import generator, number
from fedray.tasks import Learner
from fedray.vector import as_tensor

BUILDING = threading.Lock()  # torch's global generator is seeded for it
DRAWS = 16  # timesteps and noises at which each held-out example's loss is taken

Row = dict[str, Any]
Memory = dict[str, np.ndarray]  # what a client keeps from round to round: its optimizer's state


@dataclass(frozen=True, eq=False)
class TrainJob:
    """Train one client in one round. Idempotent: the same job gives the same bits wherever it runs."""

    round: int
    client: int
    indices: np.ndarray  # int64 [examples], into the dataset
    held_out: np.ndarray  # int64, the examples that it does not train on
    memory: Memory | None = None
    ema: np.ndarray | None = None  # the average so far, where it is taken at every step

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("train", self.round, self.client)

    def __str__(self) -> str:
        return f"client {self.client} in round {self.round + 1}"


@dataclass(frozen=True, eq=False)
class ValidateJob:
    """Measure a model's loss on one client's held-out examples."""

    client: int
    held_out: np.ndarray

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("held out", self.client)

    def __str__(self) -> str:
        return f"the held-out loss of client {self.client}"


@dataclass(frozen=True)
class SampleJob:
    """Generate one batch of images, and their features if they are asked for."""

    batch: int
    size: int
    sampler: str
    steps: int
    seed: int
    features: bool
    keep: int  # how many of the images are wanted, beside the features
    prompts: tuple[str, ...] = ()  # what each image of the batch is drawn for, where the task knows prompts

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("sample", self.batch)

    def __str__(self) -> str:
        return f"batch {self.batch} of the samples"


@dataclass(frozen=True)
class FeatureJob:
    """Features of the dataset's images from `start` on."""

    start: int
    stop: int

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("features", self.start)

    def __str__(self) -> str:
        return f"the features of images {self.start} to {self.stop - 1}"


@dataclass(frozen=True, eq=False)
class NearestJob:
    """The nearest training images of some images: given, or by their indices in the dataset."""

    start: int
    images: np.ndarray

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("nearest", self.start)

    def __str__(self) -> str:
        return f"the nearest training images of images from {self.start} on"


class Worker:
    """What a process needs for its jobs, built once: the learner on its device, the data, the feature network."""

    def __init__(
        self, config: Config, device: torch.device, name: str, source: Source | None = None, sha256: str | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.name = name
        self.source = source  # where this node's cache may have the data
        self.sha256 = sha256  # of the images that the run is about
        self._base: np.ndarray | None = None
        self.steps_done = 0  # optimizer steps and sampled batches since the process started
        self.on_step: Callable[[int], None] = lambda steps_done: None

    def step(self) -> None:
        """Count one step, for the progress bar."""
        self.steps_done += 1
        self.on_step(self.steps_done)

    @cached_property
    def learner(self) -> Learner:
        return build(self.config, self.device)

    def load(self, vector: Tensor, base: np.ndarray | None) -> None:
        """Make the learner this model: the vector, and the change of its frozen weights, if there is one."""
        self.learner.flat.vector.detach().copy_(vector)
        # While the last one is held, another at its address is the same: Ray maps an object once.
        if base is not None and (self._base is None or base.ctypes.data != self._base.ctypes.data):
            self.learner.set_base(as_tensor(base))  # type: ignore[attr-defined]
            self._base = base

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data: from this node's cache, without listing files again, else loaded anew.

        Raises:
            ValueError: this node has other images.
        """
        if self.source is not None and self.source.place.exists():
            return Dataset.open(self.source.place, ("caption",))
        dataset = self.config.task.dataset()
        if self.sha256 not in (None, dataset.sha256):
            raise ValueError("the images that this node has are not those of the run")
        return dataset

    @cached_property
    def features(self) -> networks.Network:
        assert self.config.features is not None
        return networks.load(self.config.features, self.config.inception_weights, self.device)


Work = Callable[[Worker, Any, Any], tuple[Row, Any]]


def build(config: Config, device: torch.device) -> Learner:
    """The task's learner with the run's initial weights, the same in every process (and in several threads)."""
    with BUILDING, _seeded(device, config.seed, "init"):
        return config.task.build(device)


class Weights(NamedTuple):
    """A model as it goes down: the payload (or, to be measured or sampled, the float32 vector itself).

    base: what is added to frozen weights, float32, where a rule has changed them.
    """

    vector: Payload
    base: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes + (0 if self.base is None else self.base.nbytes)


class Trained(NamedTuple):
    """What a client returns beside its row."""

    payload: Payload
    memory: Memory | None
    ema: np.ndarray | None


def client_update(worker: Worker, model: Weights, job: TrainJob) -> tuple[Row, Trained]:
    """Local training (McMahan et al. 2017, algorithm 1, ClientUpdate; AdamW in place of SGD).

    Raises:
        ValueError: the client has no examples.
        FloatingPointError: the trained weights are not finite.
    """
    config, learner = worker.config, worker.learner
    flat, examples = learner.flat, len(job.indices)
    device = flat.vector.device
    if examples == 0:
        raise ValueError("the client holds no examples")
    start = config.codec.decode_model(model.vector)
    flat.check()
    worker.load(start, model.base)
    learner.prepare(worker.dataset, job.indices, config.random_flip)
    optimizer = torch.optim.AdamW(
        [flat.vector],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
    if job.memory is not None:
        kept = {name: as_tensor(array).to(device, copy=True) for name, array in job.memory.items()}
        if scaler.is_enabled():
            scale = {"scale": kept.pop("scale").item(), "_growth_tracker": int(kept.pop("growth_tracker"))}
            scaler.load_state_dict(scaler.state_dict() | scale)
        optimizer.state[flat.vector] = kept
    ema = None if job.ema is None else as_tensor(job.ema).to(device, copy=True)
    steps = config.steps(examples)
    learning_rate = lr_schedule(config, steps)
    rng = generator(config.seed, *job.key)
    loss_sum = torch.zeros((), device=device)
    batch_count = image_count = 0
    for step, group in enumerate(steps_of(examples, config, rng)):
        optimizer.param_groups[0]["lr"] = learning_rate(job.round * steps + step)
        flat.gradient.zero_()
        for indices in group:
            mirrored = torch.rand(len(indices), generator=rng) < 0.5 if config.random_flip else None
            batch = batch_of(worker.dataset, job.indices[indices.numpy()], mirrored)
            with precision(config, device):
                loss = learner.loss(batch, rng)
            scaler.scale(loss / config.gradient_accumulation_steps).backward()
            loss_sum += loss.detach()
            batch_count += 1
            image_count += len(indices)
        scaler.unscale_(optimizer)
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([flat.vector], config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        if ema is not None:
            ema.lerp_(flat.vector.detach(), 1 - config.ema_decay(job.round * steps + step + 1))
        worker.step()
    flat.check()
    trained = flat.vector.detach().to("cpu", copy=True)
    if not torch.isfinite(trained).all():
        raise FloatingPointError("the trained weights are not finite (lower the learning rate?)")
    payload = config.codec.encode_update(trained, start)
    row = {
        "client": job.client, "examples": examples, "steps": steps, "images": image_count,
        "loss": loss_sum.item() / batch_count, "bytes_up": payload.nbytes,
    }  # fmt: skip
    if len(job.held_out):
        row["held_out_local"] = held_out_loss(worker, job.client, job.held_out)
    memory = None
    if config.keep_optimizer:
        memory = {name: value.cpu().numpy() for name, value in optimizer.state[flat.vector].items()}
        if scaler.is_enabled():
            state = scaler.state_dict()
            memory |= {"scale": np.array(state["scale"]), "growth_tracker": np.array(state["_growth_tracker"])}
    return row, Trained(payload, memory, None if ema is None else ema.cpu().numpy())


def validate(worker: Worker, model: Weights, job: ValidateJob) -> tuple[Row, None]:
    """The loss of a model (a float32 vector) on one client's held-out examples."""
    worker.load(as_tensor(model.vector), model.base)
    worker.step()
    return {"held_out": held_out_loss(worker, job.client, job.held_out)}, None


@torch.no_grad()
def held_out_loss(worker: Worker, client: int, held_out: np.ndarray) -> float:
    """Mean loss of the learner as it is, each example at `DRAWS` timesteps and noises, the same in every round."""
    config, rng = worker.config, generator(worker.config.seed, "held out", client)
    worker.learner.prepare(worker.dataset, held_out, False)
    losses = []
    repeated = np.tile(held_out, DRAWS)
    for start in range(0, len(repeated), config.eval_batch_size):
        indices = repeated[start : start + config.eval_batch_size]
        with precision(config, worker.learner.flat.vector.device):
            losses.append(worker.learner.loss(batch_of(worker.dataset, indices), rng).item() * len(indices))
    return sum(losses) / len(repeated)


def sample_batch(worker: Worker, model: Weights, job: SampleJob) -> tuple[Row, tuple[np.ndarray | None, np.ndarray]]:
    """One batch from the model (a float32 vector): features [size, d], and images uint8 [keep, c, h, w]."""
    worker.load(as_tensor(model.vector), model.base)
    if job.prompts:
        worker.learner.prompts = job.prompts  # type: ignore[attr-defined]
    images = worker.learner.sample(job.size, generator(job.seed, *job.key), job.sampler, job.steps)
    found = worker.features(images).numpy() if job.features else None
    worker.step()
    return {}, (found, images[: job.keep].numpy())


def dataset_features(worker: Worker, _: None, job: FeatureJob) -> tuple[Row, np.ndarray]:
    """Features [stop − start, d] of images of the dataset."""
    images = torch.from_numpy(worker.dataset.images[job.start : job.stop].copy())
    found = worker.features(images).numpy()
    worker.step()
    return {}, found


def nearest_images(worker: Worker, trained: np.ndarray, job: NearestJob) -> tuple[Row, tuple[np.ndarray, ...]]:
    """Indices of the nearest images trained on, and the distances, of uint8 images (or of those indexed)."""
    dataset = worker.dataset.images
    images = job.images if job.images.ndim > 1 else dataset[job.images]
    found = nearest(images, dataset, trained, worker.config.random_flip)
    worker.step()
    return {}, found


def batch_of(dataset: Dataset, indices: np.ndarray, mirrored: Tensor | None = None) -> dict[str, Any]:
    """Examples as tensors. Only a batch is copied: the dataset is mapped, and shared by all processes of a node."""
    images = torch.from_numpy(dataset.images[indices])
    if mirrored is None:
        mirrored = torch.zeros(len(indices), dtype=torch.bool)
    else:
        images[mirrored] = images[mirrored].flip(-1)
    batch: dict[str, Any] = {"images": images, "mirrored": mirrored, "index": torch.from_numpy(indices)}
    if dataset.labels is not None:
        batch["labels"] = torch.from_numpy(dataset.labels[indices])
    if "caption" in dataset.columns:
        batch["prompts"] = dataset.columns["caption"][indices].tolist()
    return batch


def steps_of(examples: int, config: Config, rng: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Indices of the batches of each optimizer step: epoch after epoch, each in a new order.

    An epoch's last batch may be smaller, and its last step may have fewer batches.
    """
    steps = config.steps(examples)
    while True:
        batches = torch.randperm(examples, generator=rng).split(config.train_batch_size)
        for start in range(0, len(batches), config.gradient_accumulation_steps):
            if steps == 0:
                return
            yield batches[start : start + config.gradient_accumulation_steps]
            steps -= 1


def precision(config: Config, device: torch.device) -> torch.autocast:
    """The context in which a loss is computed."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    return torch.autocast(device.type, dtype, enabled=config.mixed_precision != "no")


def lr_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Learning rate at a step of the whole run (round × local steps + local step), by diffusers' schedules."""
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler,
        dummy,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.rounds * steps,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def do(worker: Worker, work: Work, shared: Any, job: Any) -> tuple[Row, Any]:
    """Do one job; a failure is a row with an error, never an exception.

    Threads and torch's global generator (dropout draws from it) are set for the job and restored after it.
    """
    started, device = time.perf_counter(), worker.device
    try:
        with threads(worker.config.threads), _seeded(device, worker.config.seed, "global", *job.key):
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
def _seeded(device: torch.device, seed: int, *key: str | int) -> Iterator[None]:
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(number(seed, *key))
        yield
