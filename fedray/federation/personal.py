"""Clients' own models: the global one with what a client keeps to itself, or what the algorithm calls its own."""

from collections.abc import Callable
from dataclasses import replace

from fedray.config import Config
from fedray.federation.local import OWN
from fedray.federation.sampling import Sampling
from fedray.record.run import Run
from fedray.wire import Payload

SHOWN = 64  # images of a grid, in which as many clients as possible should have some


def memories(config: Config, run: Run, rounds: int) -> Callable[[int], Payload]:
    """Return a function of a client: what of its memory after so many rounds makes the global model its own.

    It reads the run's directory each time: all clients' together may not fit into memory.
    """

    def memory(client: int) -> Payload:
        kept = run.recall(client, run.generation(client, rounds))
        prefix = "algorithm/" if config.evaluate_personal else OWN
        return {name: tensor.numpy() for name, tensor in kept.items() if name == OWN or name.startswith(prefix)}

    return memory if config.personal else lambda client: {}


def by_clients(sampling: Sampling, config: Config, run: Run, rounds: int) -> Sampling:
    """Have the own models of clients sample in turn, a batch each, where the run has such models."""
    if not config.personal:
        return sampling
    clients = config.trainers
    size = min(sampling.batch_size, max(1, SHOWN // len(clients)))
    return replace(sampling, batch_size=size, clients=tuple(clients), memory=memories(config, run, rounds))
