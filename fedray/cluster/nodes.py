"""Nodes of the cluster, and how many client actors fit into each."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node  # ray.available_resources() adds nodes up
from ray._private.state import state as global_state

from fedray.config import Config
from fedray.errors import UserError

Resources = Mapping[str, float]

SHORT = 12  # characters of a node's id that the record has


class Share(NamedTuple):
    """What an actor reserves of its node."""

    cpus: float
    gpus: float  # 1/n for n actors on one GPU: others may wait for ever on several nodes (ray-project/ray 52133)

    @classmethod
    def of(cls, config: Config) -> "Share":
        gpus = config.gpus_per_actor
        return cls(config.cpus_per_actor, 1 / round(1 / gpus) if 0 < gpus < 1 else gpus)

    def fit(self, have: Resources) -> int:
        """Count the actors that fit into what a node has."""
        fitting = [math.floor(have.get("CPU", 0) / self.cpus + 1e-9)]
        if self.gpus:  # Ray rounds a share down to ten-thousandths
            fitting.append(math.floor(have.get("GPU", 0) / self.gpus + 0.01))
        return min(fitting)

    def with_room(self, actors: int, nodes: Mapping[str, Resources]) -> "Share":
        """Return a share of which fewer of so many actors are on the same node or GPU; itself where one is alone."""
        if self.gpus:  # each has that much of a GPU's memory, also where it is alone
            on_a_gpu = round(1 / self.gpus)
            return self if on_a_gpu < 2 else Share(self.cpus, 1 / (on_a_gpu // 2))

        def beside(share: Share) -> int:
            return min(actors, max(map(share.fit, nodes.values()), default=0))

        larger = self
        while beside(larger) == beside(self) > 1:
            larger = Share(larger.cpus * 2, self.gpus)
        return larger

    def at_last(self, rows: Iterable[Mapping[str, Any]]) -> "Share":
        """Return the share that actors of a run came to have where they were out of memory; never less than this."""
        found = [Share(**loss["share"]) for row in rows for loss in row.get("lost", ()) if "share" in loss]
        return Share(max(self.cpus, found[-1].cpus), max(self.gpus, found[-1].gpus)) if found else self

    def times(self, count: int) -> str:
        """Describe what that many actors need."""
        return f"{count * self.cpus:g} CPUs" + (f" and {count * self.gpus:g} GPUs" if self.gpus else "")


def alive(label: str | None = None) -> dict[str, Resources]:
    """Return what each node has, by its id, of those that live and have a label KEY=VALUE, if one is given."""
    key, _, value = (label or "").partition("=")
    nodes = [node for node in ray.nodes() if node["Alive"] and (label is None or node["Labels"].get(key) == value)]
    return {node["NodeID"]: node["Resources"] for node in nodes}


def draining() -> frozenset[str]:
    """Return the ids of nodes that are to go: an autoscaler, or `ray drain-node`, has said so."""
    return frozenset(global_state.get_draining_nodes())


def free(nodes: Collection[str] | None = None) -> dict[str, Resources]:
    """Return what nobody holds of each node, by its id; of these nodes, if they are given."""
    return {node: have for node, have in available_resources_per_node().items() if nodes is None or node in nodes}


def assign(share: Share, nodes: Mapping[str, Resources], first: str, count: int) -> list[str]:
    """Choose the nodes of so many actors, as few as will do: each node costs a copy of the model and a partial a round.

    The `first` is filled before all others, then the largest; fewer are chosen where no more fit.
    """
    order = sorted(nodes, key=lambda node: (node != first, -share.fit(nodes[node]), node))
    return [node for node in order for _ in range(share.fit(nodes[node]))][:count]


def room(share: Share, nodes: Mapping[str, Resources]) -> int:
    """Count the actors that fit: into each node by itself, since an actor is on one."""
    return sum(map(share.fit, nodes.values()))


def count_actors(config: Config) -> int:
    """Count the client actors of a run: as many as asked for, else as many as fit; never more than the cohort.

    Raises:
        UserError: the cluster has no GPU, or is too small.
    """
    slots = count_slots(config)
    return min(config.actors or slots, config.cohort_size)


def count_slots(config: Config) -> int:
    """Count the client actors that fit into the cluster.

    Raises:
        UserError: fewer fit than asked for, or none.
    """
    nodes, share = alive(config.node_label), Share.of(config)
    if config.node_label is not None and not nodes:
        raise UserError(f"--node-label {config.node_label}: no node of this machine (or cluster) has this label.")
    if share.gpus and not any(have.get("GPU") for have in nodes.values()):
        raise UserError(f"--gpus-per-actor {config.gpus_per_actor:g}: this machine (or cluster) has no GPU.")
    slots, wanted = room(share, nodes), config.actors or 1
    if wanted > slots:
        raise UserError(
            f"--actors {wanted} needs {share.times(wanted)}, and there are {describe(nodes)}: at most {slots} "
            f"fit. Ask for fewer, or lower --cpus-per-actor or --gpus-per-actor."
        )
    return slots


def describe(nodes: Mapping[str, Resources]) -> str:
    """Describe the CPUs and GPUs of nodes in words."""

    def said(name: str) -> str:
        each = [have.get(name, 0) for have in nodes.values()]
        largest = f" ({max(each):g} on the largest node)" if 0 < max(each, default=0) < sum(each) else ""
        return f"{sum(each):g} {name}s{largest}"

    return f"{said('CPU')} and {said('GPU')}"
