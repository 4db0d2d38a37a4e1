"""--gpus-per-actor auto: as many actors on a GPU as fit into it, by what a rehearsal of one needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedray.commands.aliases import name_of
from fedray.config import Config
from fedray.files import size

if TYPE_CHECKING:
    from fedray.data.dataset import Dataset

FLAG, AUTO = "--gpus-per-actor", "auto"


def whole(words: Sequence[str]) -> tuple[list[str], bool]:
    """Return a command line that asks for whole GPUs where it says `auto`, and whether it does."""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if word == AUTO and name_of(before) == FLAG:
            found.append("1")
        else:
            found.append(f"{FLAG}=1" if name_of(word) == FLAG and word.endswith(f"={AUTO}") else word)
    return found, found != list(words)


def shared(config: Config, dataset: Dataset) -> Config:
    """Return the configuration with as many actors on each GPU as it has memory, CPUs and clients for.

    One actor trains a client and samples a batch on a whole GPU; nothing of it is kept.
    """
    if config.actors == 0:
        return config
    from fedray.cluster.connection import connected
    from fedray.cluster.nodes import alive
    from fedray.cluster.pool import open_pool
    from fedray.federation.plan import make_plan
    from fedray.federation.rehearsal import measure

    print("gpus      one actor trains a client and samples a batch, to see what they need …", file=sys.stderr)
    with connected(config.address):
        with open_pool(replace(config, actors=1), dataset) as pool:
            measured = measure(config, make_plan(config, dataset), pool)
        number = actors_on_a_gpu(config, measured.fit, alive(config.node_label).values())
    needs = f"a client needs {size(measured.memory)}, and {measured.fit} such fit"
    print(f"gpus      1/{number} for each actor: {needs}", file=sys.stderr)
    return replace(config, gpus_per_actor=1 / number)


def actors_on_a_gpu(config: Config, fit: int, nodes: Iterable[Mapping[str, float]]) -> int:
    """Return how many actors are to share a GPU of these nodes, of which so many have the memory."""
    have = [node for node in nodes if node.get("GPU")]
    cpus = min(int(node.get("CPU", 0) / config.cpus_per_actor / node["GPU"] + 1e-9) for node in have)
    each = math.ceil((config.actors or config.cohort_size) / sum(node["GPU"] for node in have))
    return max(1, min(fit, cpus, each))
