"""A process that does jobs, and the state that it keeps between them. Knows nothing of Ray."""

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from fedray.checks import check_environment
from fedray.config import Config
from fedray.data.canaries import plant
from fedray.data.dataset import Dataset, Source, is_cached
from fedray.errors import UserError
from fedray.federation.causes import Cause
from fedray.federation.modes import plain
from fedray.record.run import Row
from fedray.scores import networks
from fedray.seeds import number
from fedray.tasks import AdapterLearner, AdapterTask, Learner, graphs
from fedray.vector.part import Part
from fedray.wire import Payload

if TYPE_CHECKING:
    from fedray.scores.networks.network import Network

Key = tuple[str | int, ...]  # of a job: equal for equal work
SAID = 1000  # characters of an exception that are kept
BUILDING = threading.Lock()  # torch's global generator is seeded for it


class Shared(NamedTuple):
    """Inputs that the jobs of one map share: named arrays, each sent to a node once, and a small object."""

    arrays: Payload
    about: Any = None
    merge: "Merge | None" = None  # makes one partial of several (`Parts`); None if they may not stay where they are


class Parts(NamedTuple):
    """A payload in two parts: one that is needed now, and a partial that can be merged with those of other jobs."""

    now: Any
    partial: Any  # None where it stays on the node that made it
    keys: tuple[Key, ...]  # of what is in the partial


class Done(NamedTuple):
    """Optimizer steps and sampled batches, and clients, that a process has done since it started."""

    steps: int
    clients: int


def device_of(config: Config) -> torch.device:
    """Return the device of a process: a GPU where it asks for a share of one, or what FEDRAY_DEVICE says, for tests."""
    return torch.device(os.environ.get("FEDRAY_DEVICE", "cuda") if config.gpus_per_actor else "cpu")


class Worker:
    """The state of a process that does jobs, built once: the learner on its device, the data, the feature network."""

    def __init__(
        self, config: Config, device: torch.device, name: str, source: Source | None = None, sha256: str | None = None
    ) -> None:
        check_environment(config.threads)
        self.config = config
        self.device = device
        self.name = name
        self.source = source  # where this node's cache may have the data
        self.sha256 = sha256  # of the images that the run is about
        self._base: Tensor | None = None
        self._unshared: Tensor | None = None  # the part that clients keep to themselves, as it is drawn
        self.node = ""  # where it is, for the record
        self.graphs = device.type == "cuda"  # until their memory is needed
        self.done = Done(0, 0)
        self.on_step: Callable[[int], None] = lambda steps: None

    def step(self) -> None:
        """Count one step, for the progress bar."""
        self.done = Done(self.done.steps + 1, self.done.clients)
        self.on_step(self.done.steps)

    def client(self) -> None:
        """Count one client, for its deadline."""
        self.done = Done(self.done.steps, self.done.clients + 1)

    @cached_property
    def learner(self) -> Learner:
        learner = build(self.config, self.device)
        shared = shared_part(self.config, learner)
        self._unshared = None if shared is None else shared.rest.take(learner.flat.vector.detach())
        return learner

    @cached_property
    def shared(self) -> Part | None:
        """The part of the learner's vector that clients share; None where it is all of it."""
        return shared_part(self.config, self.learner)

    @cached_property
    def _optimizer(self) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        optimizer = self.config.optimizer.make([self.learner.flat.vector], self.config.learning_rate, self.config.adam)
        return optimizer, dict(optimizer.param_groups[0])

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        """Return the vector's optimizer as it is when it is made: to make one takes as long as a tiny client's step."""
        optimizer, made = self._optimizer
        optimizer.state.clear()
        optimizer.param_groups[0].clear()
        optimizer.param_groups[0].update(made)
        return optimizer

    def load(self, vector: Tensor, base: Tensor | None = None, own: Tensor | None = None) -> None:
        """Make the learner this model: the shared vector, and the change of its frozen weights, if there is one.

        Args:
            own: the part that is not shared, of a client that has trained it; else it is as drawn.
        """
        weights = self.learner.flat.vector.detach()
        if self.shared is None:
            weights.copy_(vector)
        else:
            self.shared.put(weights, vector)
            self.shared.rest.put(weights, cast(Tensor, self._unshared) if own is None else own)
        # While the last one is held, another at its address is the same: Ray maps an object once.
        if base is not None and (self._base is None or base.data_ptr() != self._base.data_ptr()):
            cast(AdapterLearner, self.learner).set_base(base)
            self._base = base

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data: from this node's cache, without listing files again, else loaded anew.

        Raises:
            ValueError: this node has other images.
        """
        if self.source is not None and is_cached(self.source.place):
            dataset = Dataset.open(self.source.place, ("caption",))
        else:
            dataset = self.config.task.dataset()
        if self.sha256 not in (None, dataset.sha256):
            raise ValueError("the images that this node has are not those of the run")
        return plant(dataset, self.config.canaries, self.config.seed)

    @cached_property
    def poisoned(self) -> Dataset:
        """The run's data as malicious clients have it."""
        assert self.config.malicious is not None
        return self.config.malicious.attack.poison(self.dataset)

    @cached_property
    def features(self) -> "Network":
        assert self.config.features is not None
        return networks.load(self.config.features, self.config.inception_weights, self.device)


def shared_part(config: Config, learner: Learner) -> Part | None:
    """Return the part of a learner's vector that clients share; None where it is all of it.

    Raises:
        UserError: nothing would be shared, or nothing kept.
    """
    if not config.partial:
        return None
    part = Part.of(learner.flat.layout, config.shares)
    if not part.wanted or not part.rest.wanted:
        what = "nothing would be shared" if not part.wanted else "everything would be"
        given = " ".join(
            f"--{name} {value}" for name, value in (("share", config.share), ("keep-local", config.keep_local)) if value
        )
        raise UserError(f"{given}: {what}; names of parameters are, for instance, {learner.flat.layout.names[0]}.")
    return part


Work = Callable[[Worker, Any, Any], tuple[Row, Any]]
Merge = Callable[..., Any]  # of (worker, shared, a partial that may be changed or None, and others that may not)


def build(config: Config, device: torch.device) -> Learner:
    """Build the task's learner with the run's initial weights, the same in every process (and in several threads)."""
    with BUILDING, plain(), _seeded(device, config.seed, "init"):
        trains = config.method.trains
        if trains is None:
            return config.task.build(device)
        return cast(AdapterTask, config.task).build(device, trains)


def do(worker: Worker, work: Work, shared: Any, job: Any) -> tuple[Row, Any]:
    """Do one job; a failure is a row with an error, never an exception.

    Threads, torch's modes, and its global generator (dropout draws from it) are set for the job and restored after it.
    """
    started = time.perf_counter()
    try:
        row, payload = _done(worker, work, shared, job)
    except Exception as error:
        trace, cause = traceback.format_exc(), cause_of(error)
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError(too_large(worker.config, job))
        row, payload = {"error": cut(f"{type(error).__name__}: {error}"), "trace": trace, "cause": cause}, None
    return row | {"actor": worker.name, "node": worker.node, "seconds": time.perf_counter() - started}, payload


def _done(worker: Worker, work: Work, shared: Any, job: Any) -> tuple[Row, Any]:
    """Do one job; again, without CUDA graphs, if the memory that they keep is needed."""

    def once() -> tuple[Row, Any]:
        config = worker.config
        with plain(), threads(config.threads), _seeded(worker.device, config.seed, "global", *job.key):
            return work(worker, shared, job)

    try:
        return once()
    except torch.OutOfMemoryError:
        if not graphs.release():
            raise
        worker.graphs = False
    return once()  # not in the clause above: an exception keeps what its frames have


def cause_of(error: Exception) -> Cause:
    """Return why a job failed, by its exception."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return Cause.MEMORY
    # After a fault of its GPU a process is of no more use: each of its calls fails.
    return Cause.BROKEN if "CUDA error" in str(error) else Cause.CLIENT


def cut(text: str) -> str:
    """Shorten what an exception says: it may be megabytes, and it stands in every row."""
    return text if len(text) <= SAID else f"{text[:SAID]} … ({len(text):,} characters)"


def too_large(config: Config, job: Any) -> str:
    """Say that a job does not fit into the memory that its process has of a GPU, and what can be done about it."""
    return (
        f"{job} needs more GPU memory than it may have (--gpus-per-actor {config.gpus_per_actor:g}): lower "
        f"--train-batch-size {config.train_batch_size} (--gradient-accumulation-steps keeps the size of a step) or, "
        f"for samples and features, --eval-batch-size {config.eval_batch_size}; compute in --mixed-precision bf16; or "
        f"give each of fewer actors more of a GPU."
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads: float sums depend on how many there are."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(device: torch.device, seed: int, *key: str | int) -> Iterator[None]:
    """Seed torch's global generators for a block, and restore them after it.

    `torch.manual_seed` would seed all devices, and formats a stack trace for each kind that is not there.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or torch.cuda.current_device()])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(number(seed, *key))
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def model(tensors: dict[str, Tensor]) -> Shared:
    """Return a model to measure or to sample from, as jobs share it: its vector, and a change of its base."""
    return Shared({name: tensors[name].numpy() for name in ("model", "base") if name in tensors})


def sampled(server: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to sample from: the server's, with the moving average in place of the model if it has one."""
    average = {"model": server["ema/model"]} if "ema/model" in server else {}
    return {name: server[name] for name in ("model", "base") if name in server} | average
