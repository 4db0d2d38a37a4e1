"""Local training of one client, and the loss on what it holds out. Knows nothing of Ray."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.federation.worker import Weights, Worker
from fedray.record.run import Memory, Row
from fedray.seeds import generator
from fedray.vector import as_tensor
from fedray.wire.codecs import Payload

DRAWS = 16  # timesteps and noises at which each held-out example's loss is taken


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
