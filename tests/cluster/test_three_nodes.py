"""Three nodes of two actors: one vector down and one partial up for each; nodes die, join and are drained; the bits are
those of one process."""

import os
import pickle
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from runs import CHAOS, sha, train

from fedray.record.run import Run

# A dead node is found in seconds, not in a minute.
HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
}  # fmt: skip
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
SIZE = 50_000  # of the vector: above what Ray sends along with a call


@contextmanager
def three_nodes():
    """A cluster of three nodes of one CPU, which this process does not join."""
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=NODE | {"_system_config": HEALTH})
    try:
        yield cluster, [cluster.add_node(**NODE) for _ in range(2)]
    finally:
        cluster.shutdown()


RUN = """
import pickle, sys, ray, fedray, toy
ray.cloudpickle.register_pickle_by_value(toy)
fedray.run(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])
"""
SWEEP = """
import pickle, sys, ray, fedray, toy
ray.cloudpickle.register_pickle_by_value(toy)
done = fedray.sweep(fedray.Experiment(pickle.load(open(sys.argv[1], "rb")), {"seed": [0, 1]}), sys.argv[2])
assert not done.missing, done.missing
"""


def start(config, out, script=RUN):
    """Start a run or a sweep in a process of its own, as a script of a user's would."""
    saved = out.with_suffix(".pickle")
    saved.write_bytes(pickle.dumps(config))
    path = os.pathsep.join([str(Path(toy.__file__).parent), *sys.path])
    command = [sys.executable, "-c", script, str(saved), str(out)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def wait_for_row(process, out, fits):
    """Wait until the last row is one that fits, and return it."""
    deadline = time.monotonic() + 120
    while True:
        rows = Run(out).rows
        if rows and fits(rows[-1]):
            return rows[-1]
        assert process.poll() is None, f"it has ended, after {len(rows)} rounds"
        assert time.monotonic() < deadline, rows[-1:]
        time.sleep(0.1)


def short(*nodes):
    return {node.node_id[:12] for node in nodes}


def created(cluster):
    """The number of objects that each node's store has ever had, made there or arrived; by the node's id."""
    return {
        node["NodeID"][:12]: node_stats(
            node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
        ).store_stats.cumulative_created_objects
        for node in cluster.global_state.node_table()
        if node["Alive"]
    }


def drain(cluster, node):
    """Announce the end of a node, as an autoscaler or a spot machine's watcher does."""
    ray = Path(sys.executable).parent / "ray"
    subprocess.run(
        [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, "--reason",
         "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"],
        check=True, capture_output=True,
    )  # fmt: skip


def add_other_versions(cluster, folder):
    """Add a node whose processes have another torch, as the metadata on their path say."""
    (folder / "torch-1.0.dist-info").mkdir(parents=True)
    (folder / "torch-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    return cluster.add_node(**NODE, env_vars={"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])})


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10 if CHAOS else 1))
def test_nodes_come_and_go(toy_config, tmp_path, seed):
    rng = random.Random(seed)
    settings = {"labels": 6, "size": SIZE, "local_epochs": 1, "train_batch_size": 8, "evaluate_samples": 0}
    train(toy_config(**settings, rounds=90), tmp_path / "here")
    for number in range(2):
        train(toy_config(**settings, rounds=3, keep_optimizer=True, seed=number), tmp_path / f"alone-{number}")
    gate = tmp_path / "gate"
    gate.touch()
    with three_nodes() as (cluster, workers):
        slow = {"slow": tuple(range(6)), "pause": 0.3, "gate": str(gate)}
        placed = settings | slow | {"actors": None, "cpus_per_actor": 0.5, "address": cluster.address}
        out = tmp_path / "run"
        process = start(toy_config(**placed, rounds=90), out)
        try:
            # Each of six actors trains a client a round.
            wait_for_row(process, out, lambda row: [there["actors"] for there in row["nodes"].values()] == [2, 2, 2])
            before, first = created(cluster), len(Run(out).rows)
            wait_for_row(process, out, lambda row: row["round"] == first + 8)
            after, rows = created(cluster), Run(out).rows[first : first + 8]
            for row in rows:
                assert set(row["nodes"]) == short(cluster.head_node, *workers)
                here = row["nodes"].pop(cluster.head_node.node_id[:12])
                assert [here[name] for name in ("bytes_to", "bytes_from", "copies", "partials")] == [0, 0, 0, 0]
                for node in row["nodes"].values():
                    assert (node["actors"], node["clients"], node["copies"], node["partials"]) == (2, 2, 1, 1)
                    assert 4 * SIZE < node["bytes_to"] < 4 * SIZE + 10_000  # and two jobs
                    assert 8 * SIZE < node["bytes_from"] < 8 * SIZE + 10_000  # of two uploads, a sum of integers
                    assert node["seconds"] >= 2 * 0.3
                    assert 0 <= node["waiting"] < 2 * row["seconds"]["round"] - 2 * 0.3
                assert row["bytes_crossed"] == sum(there["bytes_to"] + there["bytes_from"] for there in
                                                   row["nodes"].values())  # fmt: skip
                assert (row["bytes_down"], row["bytes_up"]) == (6 * 4 * SIZE, 6 * 4 * SIZE)
            for worker in workers:
                # By what its store saw: the vector, its description, two partials and what they were merged to. Rows
                # are read a moment after their round.
                seen = after[worker.node_id[:12]] - before[worker.node_id[:12]]
                assert 8 * 5 - 4 <= seen <= 8 * 5 + 4

            time.sleep(rng.uniform(0, 1.5))
            cluster.remove_node(workers[0], allow_graceful=False)
            row = wait_for_row(process, out, lambda row: len(row["nodes"]) == 2)
            assert "node died" in {loss["cause"] for row in Run(out).rows for loss in row["lost"]}
            joined = cluster.add_node(**NODE)
            row = wait_for_row(process, out, lambda row: len(row["nodes"]) == 3)
            assert set(row["nodes"]) == short(cluster.head_node, workers[1], joined)

            drain(cluster, workers[1])
            row = wait_for_row(process, out, lambda row: len(row["nodes"]) == 2)
            assert set(row["nodes"]) == short(cluster.head_node, joined)
            told = [loss for row in Run(out).rows for loss in row["lost"] if loss["cause"] == "pre-emption"]
            assert [loss["clients"] for loss in told] == [[], []]  # two actors, and no client
            assert all(f"leaves node {workers[1].node_id[:12]}, which is being drained" in t["reason"] for t in told)
            left = len(Run(out).rows)
            cluster.remove_node(workers[1], allow_graceful=False)

            other = add_other_versions(cluster, tmp_path / "other")
            wait_for_row(process, out, lambda row: any("has torch 1.0 where" in loss["reason"] for loss in row["lost"]))
            late = start(toy_config(**placed), tmp_path / "late")
            _, said = late.communicate(timeout=60)
            assert f"UserError: node {other.node_id[:12]} has torch 1.0 where the driver has " in said
            assert not (tmp_path / "late").exists()
            rows = Run(out).rows[left:]
            assert all(set(row["nodes"]) == short(cluster.head_node, joined) for row in rows[-3:])
            assert {loss["cause"] for row in rows for loss in row["lost"]} == {"did not start"}
            cluster.remove_node(other, allow_graceful=False)

            gate.unlink()
            assert process.wait(60) == 0
        finally:
            process.kill()
        rows = Run.open(out).rows
        assert all([client["outcome"] for client in row["clients"]] == ["ok"] * 6 for row in rows)
        assert sha(out) == sha(tmp_path / "here")

        # Two trials of two actors each: one of them, or both, on two nodes.
        placed |= {"actors": 2, "cpus_per_actor": 0.5, "keep_optimizer": True, "rounds": 3}
        trials = start(toy_config(**placed), tmp_path / "sweep", SWEEP)
        try:
            assert trials.wait(120) == 0
        finally:
            trials.kill()
        runs = [Run.open(path.parent) for path in sorted((tmp_path / "sweep").glob("seed-*/config.json"))]
        used = {name for run in runs for row in run.rows for name in row["nodes"]}
        assert used == short(cluster.head_node, joined)
        assert [sha(run.directory) for run in runs] == [sha(tmp_path / f"alone-{number}") for number in range(2)]
