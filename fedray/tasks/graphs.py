"""CUDA graphs: a network's passes over batches that are all alike, launched at once in place of kernel by kernel."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

ALIKE = ContextVar[bool]("ALIKE")  # whether more batches of this size will come
LIVE: "WeakSet[Graphed]" = WeakSet()  # that have a graph, or failed to make one


def alike(many: bool) -> AbstractContextManager[None]:
    """Compute the gradient of a batch; of `many` that are of one size, on a GPU, as a CUDA graph."""
    return _alike() if many else nullcontext()


@contextmanager
def _alike() -> Iterator[None]:
    token = ALIKE.set(True)
    try:
        yield
    finally:
        ALIKE.reset(token)


def release() -> bool:
    """Free the memory of all graphs of this process; tells whether there were any."""
    graphed = list(LIVE)
    for each in graphed:
        each.release()
    return bool(graphed)


class Graphed:
    """A network as its learner's loss calls it. The kernels of a graph are the network's own, so are the bits.

    It pays where batches are small: a U-Net has thousands of kernels, and launching them one by one takes longer than
    they do. A graph is of one size of batch and keeps the memory of its activations, so there is one at a time.

    Args:
        possible: whether it can be: one that checkpoints its activations cannot.
    """

    def __init__(self, network: nn.Module, possible: bool = True) -> None:
        self.network = network
        self.possible = possible
        self._graph: nn.Module | None = None
        self._of: Any = None  # what the graph is of

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what the network predicts: its `sample` for these inputs."""
        if not (self.possible and ALIKE.get(False) and inputs[0].is_cuda and torch.is_grad_enabled()):
            return _sample(self.network, *inputs)
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        of = [(each.shape, each.dtype) for each in inputs], cast
        if self._graph is None or of != self._of:
            self.release()
            LIVE.add(self)
            self._graph, self._of = _captured(self.network, inputs), of
        predicted: Tensor = self._graph(*inputs)
        return predicted

    def release(self) -> None:
        """Forget the graph, as one must when the network's frozen weights are others."""
        if self in LIVE:
            self._graph = None
            LIVE.discard(self)
            gc.collect()  # it refers to itself
            torch.cuda.empty_cache()


class _Predicts(nn.Module):
    """The network as a graph is made of it: with tensors in and out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return _sample(self.network, *inputs)


def _sample(network: nn.Module, *inputs: Tensor) -> Tensor:
    predicted: Tensor = network(*inputs).sample
    return predicted


def _captured(network: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    with torch.random.fork_rng([inputs[0].device]):  # the passes that warm it up drop out at random, too
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            graph = torch.cuda.make_graphed_callables(
                _Predicts(network), tuple(each.clone() for each in inputs), allow_unused_input=True
            )
    return cast(nn.Module, graph)
