"""Differential privacy of a client's single examples: their gradients, clipped, with noise (Abadi et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedray.config import Config
from fedray.errors import UserError
from fedray.menus import ALGORITHMS
from fedray.seeds import uniform
from fedray.vector import FlatParameters

if TYPE_CHECKING:
    from fedray.federation.local import LocalTraining
    from fedray.tasks import Learner

MARGIN = 1 - 2.0**-20  # for rounding: no example's gradient is longer than the norm


def rate_of(config: Config, examples: int) -> float:
    """Return q, the probability with which each of a client's examples is in a step."""
    return min(1.0, config.train_batch_size * config.gradient_accumulation_steps / examples)


def drawn_steps(
    config: Config, examples: int, steps: int, draw: Callable[[int], np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """Yield the indices of the batches of each step, of at most the size of a batch; none where nothing was drawn.

    Args:
        draw: gives so many numbers in [0, 1), others every time.
    """
    rate, size = rate_of(config, examples), config.train_batch_size
    for _ in range(steps):
        drawn = np.flatnonzero(draw(examples) < rate)
        yield [drawn[start : start + size] for start in range(0, len(drawn), size)]


class Private:
    """Makes the gradients of a client's steps private.

    norm: C, which no example's gradient exceeds;  multiplier: σ, standard deviation of the noise over C.
    """

    def __init__(self, local: LocalTraining, norm: float, multiplier: float) -> None:
        config = local.worker.config
        self.norm, self.multiplier = norm, multiplier
        self.expected = rate_of(config, local.examples) * local.examples
        self.round, self.client = local.round, local.client
        self.step, self.steps = 0, local.steps

    def draw(self, examples: int) -> np.ndarray:
        """Return a number in [0, 1) for each example, of which those below q are in the next step.

        Raises:
            UserError: there are more steps than are accounted for.
        """
        if self.step == self.steps:
            raise UserError(f"this algorithm makes more than the {self.steps} steps of a client that noise hides.")
        self.step += 1
        return uniform(self.round.secret(examples, "draw examples", self.client, self.step))

    def add(self, flat: FlatParameters, compute: Callable[[], Tensor]) -> Tensor:
        """Add the clipped gradients of a batch's examples to the gradient; return the mean loss that `compute` does."""
        gradients, loss = example_gradients(flat, compute)
        flat.gradient.add_(clipped_sum(gradients, self.norm))
        return loss

    def finish(self, gradient: Tensor) -> None:
        """Make a sum of clipped gradients [d] the noisy mean of a step, in place."""
        noise = self.round.noise(len(gradient), "noise on examples", self.client, self.step)
        gradient.add_(noise.to(gradient), alpha=self.multiplier * self.norm).div_(self.expected)


def clipped_sum(gradients: Tensor, norm: float) -> Tensor:
    """Return Σ g_i min(1, norm / ‖g_i‖) of gradients [b, d]."""
    lengths = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    return (MARGIN * norm / lengths).clamp(max=1).to(gradients.dtype) @ gradients


def example_gradients(flat: FlatParameters, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the gradient of each example's loss, [b, d], and the mean loss of all, without a gradient.

    `compute` gives the mean loss over the batch, and calls the network once. Its gradient by what the network gives for
    example i, times b, is pulled back through the network for that example alone, by `torch.func`.

    Raises:
        UserError: the network is not called once, with a batch.
    """
    module, calls = flat.module, list[tuple[Any, list[Any]]]()
    own = vars(module).get("forward")
    forward = module.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            leaves, spec = tree_flatten(forward(*args, **kwargs))
        leaves = [leaf.detach().requires_grad_() if _floating(leaf) else leaf for leaf in leaves]
        calls.append(((args, kwargs), leaves))
        return tree_unflatten(leaves, spec)

    module.forward = called
    try:
        with torch.enable_grad():
            loss = compute()
            loss.backward()
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    if len(calls) != 1:
        raise UserError(
            f"the loss of this task calls its network {len(calls)} times; gradients of single examples need one call."
        )
    given, leaves = calls[0]
    inputs, spec = tree_flatten(given)
    found = [leaf.grad for leaf in leaves if _floating(leaf) and leaf.grad is not None]
    size = len(found[0])
    batched = [isinstance(each, Tensor) and each.ndim > 0 and len(each) == size for each in inputs]

    def pulled(own: list[Any], cotangents: list[Tensor]) -> Tensor:
        def out(vector: Tensor) -> list[Tensor]:
            args, kwargs = tree_unflatten([x[None] if many else x for x, many in zip(own, batched, strict=True)], spec)
            made, _ = tree_flatten(functional_call(module, flat.layout.views(vector), args, kwargs))
            used = [new for new, old in zip(made, leaves, strict=True) if _floating(old) and old.grad is not None]
            return [each[0] for each in used]

        return vjp(out, flat.vector.detach())[1](cotangents)[0]

    dims = ([0 if many else None for many in batched], 0)
    with sdpa_kernel(SDPBackend.MATH):  # what `vmap` knows of attention
        return vmap(pulled, in_dims=dims)(inputs, [size * each for each in found]), loss.detach()


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def check_examples(config: Config, learner: Learner) -> None:
    """Raise `UserError` where gradients of single examples cannot be made."""
    who, module = f"--algorithm {ALGORITHMS.form(config.algorithm)}", learner.flat.module
    if config.mixed_precision != "no":
        raise UserError(f"{who}: gradients of single examples are made in float32; leave --mixed-precision out.")
    if getattr(module, "is_gradient_checkpointing", False):
        raise UserError(f"{who}: leave --gradient-checkpointing out, which gradients of single examples cannot have.")
    if getattr(config.task, "class_prompt", None) is not None:
        raise UserError(f"{who}: class images are examples of nobody; leave --class-prompt out.")
    if getattr(config.task, "aspect_ratio_buckets", None) is not None:
        raise UserError(
            f"{who}: single examples have gradients where all have one size; leave --aspect-ratio-buckets out."
        )
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            raise UserError(f"{who}: {name} is a {type(part).__name__}, which mixes a batch's examples; use GroupNorm.")
        if isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0:
            raise UserError(f"{who}: {name} drops out at random, each time otherwise; train without dropout.")
