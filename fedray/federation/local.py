"""Local training of one client, and the loss on what it holds out. Knows nothing of Ray."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedray.algorithms import Round, Rows, Tensors, of_model
from fedray.errors import UserError
from fedray.federation.examples import Private, drawn_steps
from fedray.federation.ranks import held_by, left_out
from fedray.federation.steps import batch_of, clip, lr_schedule, precision, steps_of
from fedray.federation.worker import Shared, Worker
from fedray.record.run import Row
from fedray.seeds import generator
from fedray.tasks import Learner
from fedray.tasks.graphs import alike
from fedray.vector import as_tensor
from fedray.wire import Payload, counted, differences

OWN = "local/model"  # of a client's memory, the part of the model that it does not share
DRAWS = 16  # timesteps and noises at which each held-out example's loss is taken


@dataclass(frozen=True, eq=False)
class TrainJob:
    """A job to train one client in one round. Idempotent: the same job gives the same bits wherever it runs."""

    round: int
    client: int
    indices: np.ndarray  # int64 [examples], into the dataset
    held_out: np.ndarray  # int64, the examples that it does not train on
    memory: Payload = field(default_factory=dict)  # what it kept, by name
    malicious: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("train", self.round, self.client)

    def __str__(self) -> str:
        return f"client {self.client} in round {self.round + 1}"


@dataclass(frozen=True, eq=False)
class ValidateJob:
    """A job to measure a model's loss on one client's held-out examples."""

    client: int
    held_out: np.ndarray
    memory: Payload = field(default_factory=dict)  # what makes the model its own

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("held out", self.client)

    def __str__(self) -> str:
        return f"the held-out loss of client {self.client}"


class Trained(NamedTuple):
    """A trained client's reply beside its row: the message to the server, the algorithm's numbers, the next memory."""

    payload: Payload
    rows: Rows
    memory: Payload


class LocalTraining:
    """One client's training in one round: what an algorithm's hooks see, and the loop of optimizer steps."""

    def __init__(self, worker: Worker, round: Round, job: TrainJob) -> None:
        config = worker.config
        self.worker = worker
        self.dataset = worker.poisoned if job.malicious else worker.dataset
        self.round = round
        self.job = job
        self.client = job.client
        self.examples = len(job.indices)
        self.steps = config.steps(self.examples)
        self.step = 0
        self.total_learning_rate = 0.0
        self._reach = 0.0  # the weights of all gradients in the step: 1 without momentum
        self.loss_sum = torch.zeros((), device=worker.device)
        self.watchers: list[Callable[[], Any]] = []
        self.batches = 0
        self.images = 0
        self.private: Private | None = None
        self.optimizer = worker.fresh_optimizer()
        self.scaler = torch.amp.GradScaler(worker.device.type, enabled=config.mixed_precision == "fp16")

    @property
    def weights(self) -> Tensor:
        """The weights [d] as they are trained; where clients share a part of them, a copy of that."""
        weights, shared = self.worker.learner.flat.vector.detach(), self.worker.shared
        return weights if shared is None else shared.take(weights)

    def watch(self, stepped: Callable[[], Any]) -> None:
        """Call `stepped` after each step."""
        self.watchers.append(stepped)

    def protect(self, norm: float, multiplier: float) -> None:
        """Make steps of clipped gradients of single examples, with noise of `multiplier` times `norm` on their sum."""
        if self.private is not None:
            raise UserError("this algorithm asks for noise on examples twice; once is enough.")
        self.private = Private(self, norm, multiplier)

    def run(self, correct: Callable[[Tensor], None]) -> None:
        """Train for `steps` steps: `correct` gets the gradient [d] before each is clipped and made."""
        worker, config, job, flat = self.worker, self.worker.config, self.job, self.worker.learner.flat
        learning_rate = lr_schedule(
            config.lr_scheduler, config.learning_rate, config.lr_warmup_steps, config.rounds * self.steps
        )
        held = held_by(self.client, self.round)
        held = None if held is None else held.to(worker.device)
        rng = generator(config.seed, *job.key)
        steps = steps_of(self.examples, config, rng)
        if self.private is not None:
            steps = drawn_steps(config, self.examples, self.steps, self.private.draw)
        for step, group in enumerate(steps):
            rate = learning_rate(job.round * self.steps + step)
            self.optimizer.param_groups[0]["lr"] = rate
            self._accumulate([job.indices[indices] for indices in group], rng)
            self.scaler.unscale_(self.optimizer)
            if worker.shared is None:
                correct(flat.gradient)
            else:
                gradient = worker.shared.take(flat.gradient)
                correct(gradient)
                worker.shared.put(flat.gradient, gradient)
            if held is not None:
                flat.gradient.masked_fill_(~held, 0)
            if config.max_grad_norm is not None:
                clip(flat.gradient, config.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.step += 1
            self._reach = self.optimizer.param_groups[0].get("momentum", 0.0) * self._reach + 1.0
            self.total_learning_rate += rate * self._reach
            for stepped in self.watchers:
                stepped()
            worker.step()
        if not self.batches:  # nothing was drawn, and the record needs a loss
            with torch.no_grad():
                self.loss_sum, self.batches = self._loss(job.indices[: config.train_batch_size], rng), 1

    def apart(self, start: Tensor, correct: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
        """Train another model from `start` [d], with a fresh optimizer; return it, and its mean loss."""
        self._check_not_private()
        flat = self.worker.learner.flat.vector
        weights, state = flat.detach().clone(), self.optimizer.state.pop(flat, None)
        other = LocalTraining(self.worker, self.round, self.job)
        flat.detach().copy_(start)
        other.run(lambda gradient: correct(gradient, flat.detach()))
        model = flat.detach().clone()
        flat.detach().copy_(weights)
        self.optimizer = self.worker.fresh_optimizer()
        if state is not None:
            self.optimizer.state[flat] = state
        return model, other.loss_sum / other.batches

    def _accumulate(self, batches: list[np.ndarray], rng: torch.Generator) -> None:
        """Make the gradient that of the mean loss of some batches."""
        parts, flat = self.worker.config.gradient_accumulation_steps, self.worker.learner.flat
        flat.gradient.zero_()
        for indices in batches:
            if self.private is not None:
                loss = self.private.add(flat, partial(self._loss, indices, rng))
            else:
                loss = self._loss(indices, rng)
                # An operation on a scalar takes as long as one on a tiny client's weights.
                self.scaler.scale(loss if parts == 1 else loss / parts).backward()
            self.loss_sum += loss.detach()
            self.batches += 1
            self.images += len(indices)
        if self.private is not None:
            self.private.finish(flat.gradient)

    def _check_not_private(self) -> None:
        if self.private is not None:
            raise UserError("this algorithm also looks at examples without noise: leave dpsgd, or that algorithm, out.")

    def _loss(self, indices: np.ndarray, rng: torch.Generator) -> Tensor:
        config = self.worker.config
        mirrored = torch.rand(len(indices), generator=rng) < 0.5 if config.random_flip else None
        batch = batch_of(self.dataset, indices, mirrored)
        many = self.worker.graphs and self.private is None and len(indices) == config.train_batch_size
        with precision(config, self.worker.device), alike(many):
            return self.worker.learner.loss(batch, rng)

    def gradient(self) -> Tensor:
        """Return the gradient [d] of the mean loss on all of the client's examples, at its weights as they are."""
        self._check_not_private()
        job, size, gradient = self.job, self.worker.config.train_batch_size, self.worker.learner.flat.gradient
        rng = generator(self.worker.config.seed, "gradient", job.round, job.client)
        gradient.zero_()
        for start in range(0, self.examples, size):
            indices = job.indices[start : start + size]
            (self._loss(indices, rng) * (len(indices) / self.examples)).backward()
        return gradient.clone()

    # The optimizer between rounds

    def restore(self, memory: Tensors) -> None:
        """Make the optimizer what it was in the client's last round."""
        if not memory:
            return
        if self.scaler.is_enabled():
            scale = {"scale": memory.pop("scale").item(), "_growth_tracker": int(memory.pop("growth_tracker"))}
            self.scaler.load_state_dict(self.scaler.state_dict() | scale)
        self.optimizer.state[self.worker.learner.flat.vector] = memory

    def keep(self) -> Tensors:
        """Return the optimizer's state."""
        state = self.optimizer.state[self.worker.learner.flat.vector]
        kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if self.scaler.is_enabled():
            scale = self.scaler.state_dict()
            kept |= {"scale": torch.tensor(scale["scale"]), "growth_tracker": torch.tensor(scale["_growth_tracker"])}
        return kept


def client_update(worker: Worker, shared: Shared, job: TrainJob) -> tuple[Row, Trained]:
    """Train one client (McMahan et al. 2017, algorithm 1, ClientUpdate; any optimizer in place of SGD).

    `shared` is what goes down to all clients, and the `Round`. What is returned may lie in the memory that the next
    client is trained in.

    Raises:
        ValueError: the client has no examples.
    """
    config, learner, round, device = worker.config, worker.learner, shared.about, worker.device
    method, wire = config.method, config.links
    if len(job.indices) == 0:
        raise ValueError("the client holds no examples")
    received = wire.arrive(shared.arrays, round)
    down = method.receive({name: tensor.to(device) for name, tensor in received.items()}, round)
    memory = {name: as_tensor(array).to(device, copy=True) for name, array in job.memory.items()}
    own = under("algorithm/", memory)
    worker.load(method.start(down, own), down.get("base"), memory.get(OWN))
    if round.adapters is not None:
        round.adapters.cut(learner.flat.vector.detach(), job.client)
    local = LocalTraining(worker, round, job)
    learner.prepare(local.dataset, job.indices, config.random_flip)
    try:
        if config.keep_optimizer:
            local.restore(under("optimizer/", memory))
        method.train(local, down, own)
        if not local.batches:
            raise ValueError("the algorithm's train made no step")
        optimizer = local.keep() if config.keep_optimizer else {}
    finally:
        local.optimizer.state.clear()  # two vectors, which sampling may need the memory of
    learner.flat.check()
    tensors, rows, kept = method.upload(local, down, own)
    sent = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if job.malicious and config.malicious is not None:
        attack, rng = config.malicious.attack, round.rng("attack", job.client)
        for name in filter(of_model, list(sent)):
            sent[name] = attack.change(sent[name], received[name], rng)
    if wire.lossy:
        sent = differences(sent, received)
    links = {name: tensor.cpu() for name, tensor in memory.items() if name.startswith("link")}
    payload, kept_by_links = wire.encode(left_out(sent, job.client, round), links, round, job.client)
    payload = config.fold.seal(payload, round, job.client)
    up = counted(payload, method.uncounted) + config.fold.exchanged(round)[1]
    row = {
        "client": job.client, "examples": local.examples, "steps": local.steps, "images": local.images,
        "loss": local.loss_sum.item() / local.batches, "bytes_up": up,
    }  # fmt: skip
    if len(job.held_out):
        row["held_out_local"] = _own_loss(local, kept)
    after = {f"algorithm/{name}": tensor for name, tensor in kept.items()} | kept_by_links
    after |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
    if worker.shared is not None:
        after[OWN] = worker.shared.rest.take(learner.flat.vector.detach())
    return row, Trained(payload, rows, {name: _own(tensor, learner).numpy() for name, tensor in after.items()})


def load_own(worker: Worker, tensors: Tensors, memory: Payload) -> None:
    """Make the learner a client's own model: the global one, with what the client keeps of it (`personal.memories`)."""
    kept = {name: as_tensor(array) for name, array in memory.items()}
    model = worker.config.method.personal(tensors["model"], under("algorithm/", kept)) if kept else tensors["model"]
    worker.load(model, tensors.get("base"), kept.get(OWN))


def _own_loss(local: LocalTraining, kept: Tensors) -> float:
    """Return the held-out loss of a client's own model. The trained weights stay: what it sends may lie in them."""
    worker, job, weights = local.worker, local.job, local.weights
    own = worker.config.method.personal(weights, kept)
    if own is weights:
        return held_out_loss(worker, job.client, job.held_out)
    before = weights.clone()
    weights.copy_(own)
    try:
        return held_out_loss(worker, job.client, job.held_out)
    finally:
        weights.copy_(before)


def _own(tensor: Tensor, learner: Learner) -> Tensor:
    """Return a tensor on the CPU, copied if it lies in the memory that the next client is trained in."""
    live = {flat.untyped_storage().data_ptr() for flat in (learner.flat.vector, learner.flat.gradient)}
    tensor = tensor.detach()
    return tensor.cpu() if tensor.untyped_storage().data_ptr() not in live else tensor.to("cpu", copy=True)


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def validate(worker: Worker, shared: Shared, job: ValidateJob) -> tuple[Row, None]:
    """Measure the loss of a model on one client's held-out examples."""
    tensors = {name: as_tensor(array) for name, array in shared.arrays.items()}
    load_own(worker, tensors, job.memory)
    worker.step()
    return {"held_out": held_out_loss(worker, job.client, job.held_out)}, None


@torch.no_grad()
def held_out_loss(worker: Worker, client: int, held_out: np.ndarray) -> float:
    """Return the learner's mean loss, each example at `DRAWS` timesteps and noises, the same in every round."""
    config, rng = worker.config, generator(worker.config.seed, "held out", client)
    worker.learner.prepare(worker.dataset, held_out, False)
    losses = []
    repeated = np.tile(held_out, DRAWS)
    for start in range(0, len(repeated), config.eval_batch_size):
        indices = repeated[start : start + config.eval_batch_size]
        with precision(config, worker.learner.flat.vector.device):
            losses.append(worker.learner.loss(batch_of(worker.dataset, indices), rng).item() * len(indices))
    return sum(losses) / len(repeated)
