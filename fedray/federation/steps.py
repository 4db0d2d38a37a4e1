"""What optimizer steps take: batches, their order, precision, learning rates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.config import Config
from fedray.data.dataset import Dataset


def batch_of(dataset: Dataset, indices: np.ndarray, mirrored: Tensor | None = None) -> dict[str, Any]:
    """Return examples as tensors. Only a batch is copied: the dataset is mapped, one for all processes of a node."""
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


def steps_of(examples: int, config: Config, rng: torch.Generator) -> Iterator[list[np.ndarray]]:
    """Yield the indices of the batches of each optimizer step: epoch after epoch, each in a new order.

    An epoch's last batch may be smaller (or is left out), and its last step may have fewer batches.
    """
    steps, size, count = config.steps(examples), config.train_batch_size, config.batches(examples)
    while steps:
        order = torch.randperm(examples, generator=rng).numpy()
        batches = [order[start : start + size] for start in range(0, count * size, size)]
        for start in range(0, len(batches), config.gradient_accumulation_steps):
            yield batches[start : start + config.gradient_accumulation_steps]
            steps -= 1
            if steps == 0:
                return


def clip(gradient: Tensor, norm: float) -> None:
    """Scale a gradient [d] down to that norm, in place: `torch.nn.utils.clip_grad_norm_` of one vector, to the bit.

    That one gathers the norms of many, which takes as long as all other operations on a tiny client's gradient.
    """
    gradient.mul_((norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0))


def precision(config: Config, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a loss is computed."""
    if config.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision])


@cache
def lr_schedule(kind: str, rate: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step in a run of so many (diffusers' schedules)."""
    if kind == "constant":
        return lambda step: rate
    from diffusers.optimization import get_scheduler  # takes seconds to import

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: rate * factor(step)
