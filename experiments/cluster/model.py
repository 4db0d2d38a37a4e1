"""Where does the time of a round go on N nodes of G GPUs? A discrete simulation with measured constants.

    python experiments/cluster/model.py --measure    # constants of this machine, and the check on 1, 2 and 3 nodes
    python experiments/cluster/model.py              # large clusters, by the constants in model.json; the figure

A round, as fedray does it: the driver puts the vector into its object store, each node gets it once by the driver's
network, actors take blocks of clients from the driver (sized by fedray's own `Pace`), train and fold them, partials are
merged, the driver makes the next model. Partials: one per node (merged there), or one per block.
"""

import heapq
import json
import math
import os
import secrets
import statistics
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from fedray import Config
from fedray.data.dataset import Dataset
from fedray.data.partition import ByLabel
from fedray.federation.blocks import Pace
from fedray.vector.integers import add_term, first_term, mean_of, to_floats

HERE = Path(__file__).parent
DOWN, PARTIAL = 4, 8  # bytes of a weight: float32, and a sum of integers


@dataclass(frozen=True)
class Constants:
    """Seconds, measured on one machine."""

    put: float  # per byte that goes into the object store
    transfer: float  # per byte from one node to another
    add: float  # per weight of an upload that is folded
    merge: float  # per weight of a partial that is merged with another
    result: float  # per weight of the next model
    block: float  # of the driver, per block
    take: float  # of the driver, per block and client that waits: to size the block
    answer: float  # from a request to an actor to its answer, beside the driver's
    start: float  # until an actor can work


@dataclass(frozen=True)
class Cluster:
    """A cluster, and a round on it."""

    nodes: int
    actors: int  # per node
    weights: int
    cohort: int
    seconds: float  # of a client's training; its fold is counted apart
    spread: float = 0.0  # of the logarithm of `seconds` among clients
    merged: bool = True  # partials, at their nodes
    tree: bool = False  # the vector and partials go along a tree of nodes, not all through the driver's network


class Waiting(deque[int]):
    """Clients that wait, which `Pace` counts at once: there may be a hundred thousand."""

    def __iter__(self) -> Any:
        yield self

    @staticmethod
    def steps(client: Any) -> int:
        return len(client) if isinstance(client, Waiting) else 1


def simulate(cluster: Cluster, constants: Constants, seed: int = 0) -> dict[str, float]:
    """Return the seconds of a round, and the parts of it that follow each other: down, train, up, model.

    Also: compute, the seconds that each actor trains on average; driver and network, the seconds that these are busy.
    """
    c, size = constants, cluster.weights
    rng, pace = np.random.default_rng(seed), Pace()
    pace.seconds_per_step = cluster.seconds
    workers = cluster.nodes * cluster.actors
    driver = c.put * DOWN * size  # when it is free again
    hops = cluster.nodes - 1 if not cluster.tree else math.ceil(math.log2(cluster.nodes))
    down, up = c.transfer * DOWN * size, c.transfer * PARTIAL * size
    has = [driver]  # when each node has the vector; the driver's is the first
    for node in range(1, cluster.nodes):
        has.append(driver + down * (node if not cluster.tree else math.ceil(math.log2(node + 1))))
    network = has[-1] if cluster.nodes > 1 else 0.0
    busy_network, busy_driver, compute = down * hops, driver, 0.0
    todo, held = Waiting(range(cluster.cohort)), [0] * cluster.nodes
    events = [(0.0, actor, False) for actor in range(workers)]  # when an actor is free, or has a block done
    over = trained = first = max(has)
    while events:
        now, actor, replies = heapq.heappop(events)
        node = actor // cluster.actors
        if replies and (node == 0 or not cluster.merged):  # its partial comes to the driver, which waits for it
            if node:
                network = max(network, driver, now) + up
                busy_network += up
            driver = max(driver, now, network if node else 0.0) + c.merge * size
            busy_driver += c.merge * size
            over = max(over, driver)
        elif replies:
            held[node] += 1
        if not todo:
            continue
        taking = c.block + c.take * len(todo)
        driver = max(driver, now) + taking
        busy_driver += taking
        clients = pace.take(todo, todo.steps, workers)
        lasts = cluster.seconds * np.exp(rng.normal(-(cluster.spread**2) / 2, cluster.spread, len(clients))).sum()
        compute += lasts
        lasts += c.add * size * len(clients)
        if held[node]:  # goes on with what an earlier block has left there
            held[node] -= 1
            lasts += c.merge * size
        done = max(driver, has[node]) + c.answer + lasts
        trained = max(trained, done)
        heapq.heappush(events, (done, actor, True))
    over = max(over, trained)
    # What lies on the nodes is merged there, and crosses: all through one network, or pairwise.
    left = [count for count in held if count]
    if left:
        at_nodes = trained + max((count - 1) * c.merge * size for count in left) + c.answer
        crossings = len(left) if not cluster.tree else math.ceil(math.log2(len(left) + 1))
        busy_network += up * crossings
        busy_driver += c.merge * size * crossings
        if cluster.tree:
            over = max(over, at_nodes + crossings * (up + c.merge * size))
        else:  # one crosses while the one before is merged
            over = max(over, at_nodes + crossings * max(up, c.merge * size) + min(up, c.merge * size))
    seconds = over + c.result * size
    found = {
        "round": seconds, "down": first, "train": max(0.0, trained - first), "up": over - max(trained, first),
        "model": c.result * size, "compute": compute / workers, "driver": busy_driver + c.result * size,
        "network": busy_network,
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


# --- measuring


@dataclass(frozen=True)
class Sleeping:
    """A vector of so many weights, and clients that sleep instead of training it."""

    name: ClassVar[str] = "sleeping"
    offers: ClassVar[frozenset[str]] = frozenset({"labels"})
    weights: int = 2_000_000
    clients: int = 12
    pause: float = 0.1

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        return Dataset(np.zeros((self.clients, 1, 2, 2), np.uint8), np.arange(self.clients))

    def build(self, device: torch.device) -> Any:
        return SleepingLearner(self)


class SleepingLearner:
    def __init__(self, task: Sleeping) -> None:
        from fedray.vector import FlatParameters

        self.task, self.network = task, nn.Linear(task.weights, 1, bias=False)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> Tensor:
        time.sleep(self.task.pause)
        return self.network.weight[0, :10].square().sum()

    def save(self, directory: Path) -> None:
        directory.mkdir()


def seconds_of(work: Any, clock: Any = time.perf_counter) -> float:
    """Return the median seconds of some work."""
    found = []
    for _ in range(7):
        began = clock()
        work()
        found.append(clock() - began)
    return statistics.median(found)


def nothing(worker: Any, shared: Any, job: Any) -> Any:
    return {}, None


@dataclass(frozen=True)
class Nothing:
    key: tuple[str, int] = ("nothing", 0)


def constants_here(weights: int = 4_000_000) -> Constants:
    """Measure the constants, with two nodes on this machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from fedray.cluster.pool import RayPool
    from fedray.federation.worker import Shared

    torch.set_num_threads(1)
    x = np.random.default_rng(0).normal(size=weights).astype(np.float32) * 0.01
    total, other = first_term(x, 2.0**40), first_term(x, 2.0**40)
    cpu = time.thread_time  # others may share the machine
    add = seconds_of(lambda: add_term(total, x, 2.0**40), cpu) / weights
    merge = seconds_of(lambda: np.add(total, other, out=total), cpu) / weights
    result = seconds_of(lambda: mean_of(to_floats(total.copy(), 2.0**-40), 3.0), cpu) / weights
    pace = Pace()
    pace.seconds_per_step = 0.5
    take = seconds_of(lambda: pace.take(deque(range(10_000)), lambda client: 1, 100), cpu) / 10_000
    with nodes_of(2) as address:
        ray.init(address=address, namespace="fedray", log_to_driver=False, logging_level="ERROR")
        try:
            put = seconds_of(lambda: ray.put(x)) / x.nbytes
            elsewhere = [n["NodeID"] for n in ray.nodes() if n["NodeID"] != ray.get_runtime_context().get_node_id()][0]
            there = NodeAffinitySchedulingStrategy(elsewhere, soft=False)
            make = ray.remote(num_cpus=0, scheduling_strategy=there)(lambda: np.ones(weights, np.int64))
            refs = [make.remote() for _ in range(7)]
            ray.wait(refs, num_returns=len(refs), fetch_local=False)
            waiting = iter(refs)
            transfer = seconds_of(lambda: ray.get(next(waiting))) / (PARTIAL * weights)
            began = time.perf_counter()
            pool = RayPool.start(
                Config(task=Sleeping(weights=10), clients=12, partition=ByLabel(), local_steps=1, actors=1)
            )
            jobs, shared = [Nothing()] * 300, Shared({})
            list(pool.map(nothing, shared, jobs[:1], lambda done: None))
            start = time.perf_counter() - began
            took, used = [], []
            for _ in range(5):
                began, before = time.perf_counter(), time.process_time()
                list(pool.map(nothing, shared, jobs, lambda done: None))
                took.append((time.perf_counter() - began) / len(jobs))
                used.append((time.process_time() - before) / len(jobs))
            pool.close()
        finally:
            ray.shutdown()
    block = statistics.median(used)
    answer = max(0.0, statistics.median(took) - block)
    return Constants(put, transfer, add, merge, result, block, take, answer, start)


class nodes_of:
    """A cluster of so many nodes on this machine, each with a CPU."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> str:
        from ray.cluster_utils import Cluster as Local

        node = {"num_cpus": 1, "object_store_memory": 400_000_000, "include_dashboard": False}
        self.cluster = Local(initialize_head=True, connect=False, head_node_args=node)
        for _ in range(self.count - 1):
            self.cluster.add_node(**node)
        return self.cluster.address

    def __exit__(self, *_: Any) -> None:
        self.cluster.shutdown()


def here(row: dict[str, Any], constants: Constants) -> Cluster:
    """Return the cluster of a measured round, one actor on each node."""
    training = max(0.0, row["client"] - constants.add * row["weights"])
    return Cluster(row["nodes"], 1, row["weights"], row["cohort"], training, merged=row["merged"])


def check(constants: Constants, rounds: int = 12) -> list[dict[str, Any]]:
    """Do rounds on 1, 2 and 3 local nodes, of clients that sleep, and put the model's beside the measured ones."""
    import fedray
    from fedray.record.run import Run

    rows = []
    for nodes in (1, 2, 3):
        for weights, pause in ((1_000, 0.2), (2_000_000, 0.2)):
            task = Sleeping(weights=weights, pause=pause)
            config = Config(
                task=task, clients=task.clients, partition=ByLabel(), rounds=rounds, local_steps=1, train_batch_size=1,
                evaluate_samples=0, features=None,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder, nodes_of(nodes) as address:
                out = Path(folder) / "run"
                fedray.run(replace(config, address=address, actors=nodes), out)
                found = [row for row in Run(out).rows[2:] if len(row["nodes"]) == nodes]
            measured = statistics.median(row["seconds"]["round"] for row in found)
            client = statistics.median(each["seconds"] for row in found for each in row["clients"])
            row = {
                "nodes": nodes, "weights": weights, "cohort": task.clients, "client": client, "rounds": len(found),
                "merged": "bytes_crossed" in found[0], "measured": measured,
            }  # fmt: skip
            rows.append(row | {"model": simulate(here(row, constants), constants)["round"]})
            print(rows[-1])
    return rows


# --- large clusters

PAPER = 113_673_219
NETWORK = 25e9 / 8  # bytes per second of a node, assumed
CLIENT = 20 * 5 / 210  # seconds: 20 images, five epochs, 210 images a second in batches of 16 (docs/benchmarks.md)
LARGE = {
    "64 × 8 GPUs, cohort 1,024": Cluster(64, 8, PAPER, 1024, CLIENT, 0.5),
    "the same, a partial per block": Cluster(64, 8, PAPER, 1024, CLIENT, 0.5, merged=False),
    "the same, along a tree of nodes": Cluster(64, 8, PAPER, 1024, CLIENT, 0.5, tree=True),
    "cohort 10,240": Cluster(64, 8, PAPER, 10_240, CLIENT, 0.5),
    "cohort 102,400 of a million": Cluster(64, 8, PAPER, 102_400, CLIENT, 0.5),
    "640 × 8 GPUs, cohort 10,240": Cluster(640, 8, PAPER, 10_240, CLIENT, 0.5),
    "the same, along a tree of nodes ": Cluster(640, 8, PAPER, 10_240, CLIENT, 0.5, tree=True),
    "LoRA of Stable Diffusion 1.5, 64 × 8, cohort 1,024": Cluster(64, 8, 1_594_368, 1024, CLIENT, 0.5),
}


def table(constants: Constants) -> dict[str, dict[str, float]]:
    """Simulate the large clusters, with an assumed network in place of this machine's memory."""
    assumed = replace(constants, transfer=1 / NETWORK)
    return {name: simulate(cluster, assumed) for name, cluster in LARGE.items()}


def lines(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the table in Markdown."""
    written = [
        "| | round | down | train | up | model | actors train | driver busy | its network busy |",
        "|" + "---|" * 9,
    ]
    for name, row in found.items():
        share = [row[part] / row["round"] for part in ("compute", "driver", "network")]
        parts = [f"{row[part]:.3g} s" for part in ("round", "down", "train", "up", "model")]
        written.append(f"| {name.strip()} | {' | '.join([*parts, *(f'{each:.0%}' for each in share)])} |")
    return written


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Draw where the time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    names, left = list(found), np.zeros(len(found))
    for part, color in zip(("down", "train", "up", "model"), ("#4c72b0", "#55a868", "#c44e52", "#8c8c8c"), strict=True):
        share = np.array([row[part] / row["round"] for row in found.values()])
        axes.barh(names, share, left=left, color=color, label=part)
        left += share
    for y, row in enumerate(found.values()):
        axes.text(1.01, y, f"{row['round']:.0f} s" if row["round"] >= 10 else f"{row['round']:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of a round")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(measure: bool = False, figure: Path = HERE.parents[1] / "docs/scale.png") -> None:
    """Simulate rounds of large clusters.

    Args:
        measure: measure the constants, and check the model on 1, 2 and 3 nodes of this machine (minutes).
        figure: where the figure goes.
    """
    kept = HERE / "model.json"
    if measure:
        constants = constants_here()
        print(constants)
        kept.write_text(json.dumps({"constants": asdict(constants), "check": check(constants)}, indent=1) + "\n")
    constants = Constants(**json.loads(kept.read_text())["constants"])
    print(f"A run first waits {constants.start:.1f} s for the actors of all nodes, which start at once.")
    found = table(constants)
    print("\n".join(lines(found)))
    draw(found, figure)


if __name__ == "__main__":
    tyro.cli(main)
