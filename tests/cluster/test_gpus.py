"""Which actor is on which GPU: nodes with two GPUs and one, as Ray counts them; the actors compute on CPUs."""

import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import toy
from ray.cluster_utils import Cluster
from runs import sha, train

NODE = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
A100 = {"ray.io/accelerator-type": "A100"}

SCRIPT = """
import pickle, sys, time, ray, fedray, toy
from dataclasses import replace
from fedray.commands.share import shared
from fedray.cluster.connection import connected
from fedray.cluster.nodes import Share, free, room
from fedray.cluster.pool import RayPool
from runs import fit
runs, trials, address = pickle.load(open(sys.argv[1], "rb"))
ray.cloudpickle.register_pickle_by_value(toy)
with connected(address):
    for out, config in runs.items():
        deadline = time.monotonic() + 60
        while room(Share(0.25, 0.25), free()) < 12 and time.monotonic() < deadline:
            time.sleep(0.1)  # until Ray has taken back what the actors of the run before had
        pool = RayPool.start(config)
        for actor in pool.actors:
            actor.start()
        list(fit(config, pool, out))
        pool.close()
    for out, experiment in trials.items():
        done = fedray.sweep(experiment, out)
        assert not done.missing, done.missing
    config = replace(config, task=replace(config.task, seats=""), actors=None, gpus_per_actor=1.0)
    print(1 / shared(config, config.task.dataset()).gpus_per_actor)
"""


def seats(folder):
    """The number of processes on each GPU of each node."""
    return Counter(tuple(path.name.split("-")[:2]) for path in Path(folder).iterdir())


def most_at_once(folder):
    """The most processes that had each GPU of each node at the same time, from when they began to their last step."""
    spans = defaultdict(list)
    for path in Path(folder).iterdir():
        spans[tuple(path.name.split("-")[:2])].append((float(path.read_text()), path.stat().st_mtime))
    return {
        gpu: max(sum(begun <= moment < ended for begun, ended in held) for moment, _ in held)
        for gpu, held in spans.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_which_actor_is_on_which_gpu(toy_config, tmp_path, monkeypatch):
    from fedray.cluster.trials import Experiment

    monkeypatch.setenv("FEDRAY_DEVICE", "cpu")
    settings = {"labels": 6, "rounds": 1, "local_epochs": 1, "evaluate_samples": 0, "cpus_per_actor": 0.25}

    def on_gpus(name, **changes):
        (tmp_path / name).mkdir()
        slow = {"slow": tuple(range(6)), "pause": 0.1, "seats": str(tmp_path / name)}
        return toy_config(**settings, **slow, **changes)

    label = {"node_label": "ray.io/accelerator-type=A100"}
    runs = {
        "whole": on_gpus("whole", actors=3, gpus_per_actor=1.0),
        "half": on_gpus("half", actors=5, gpus_per_actor=0.5),
        "quarter": on_gpus("quarter", actors=5, gpus_per_actor=0.25),
        "label": on_gpus("label", actors=2, gpus_per_actor=0.5, **label),
    }
    trials = {
        "whole-trials": (on_gpus("whole-trials", actors=1, gpus_per_actor=1.0), 4),
        "half-trials": (on_gpus("half-trials", actors=1, gpus_per_actor=0.5, **label), 3),
        "quarter-trials": (on_gpus("quarter-trials", actors=2, gpus_per_actor=0.25, **label), 3),
    }
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=NODE | {"num_gpus": 2})
    try:
        other = cluster.add_node(**NODE, num_gpus=1, labels=A100)
        first, second, third = *((cluster.head_node.node_id[:12], gpu) for gpu in "01"), (other.node_id[:12], "0")
        runs_of = {str(tmp_path / f"run-{name}"): config for name, config in runs.items()}
        trials_of = {
            str(tmp_path / f"run-{name}"): Experiment(config, {"seed": list(range(number))})
            for name, (config, number) in trials.items()
        }
        (tmp_path / "asked").write_bytes(pickle.dumps((runs_of, trials_of, cluster.address)))
        path = os.pathsep.join([str(Path(toy.__file__).parent), *sys.path])
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "asked")]
        env = os.environ | {"PYTHONPATH": path}
        said = subprocess.run(command, env=env, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout
    finally:
        cluster.shutdown()
    assert seats(tmp_path / "whole") == {first: 1, second: 1, third: 1}
    assert seats(tmp_path / "half") == {first: 2, second: 2, third: 1}  # the driver's node is filled
    found = seats(tmp_path / "quarter")
    assert found[first] + found[second] == 5
    assert max(found.values()) == 4  # and before another GPU is begun, the one that is
    assert seats(tmp_path / "label") == {third: 2}
    assert most_at_once(tmp_path / "whole-trials") == {first: 1, second: 1, third: 1}  # of four trials
    assert most_at_once(tmp_path / "half-trials") == {third: 2}  # of three
    assert most_at_once(tmp_path / "quarter-trials") == {third: 4}  # of three with two actors each
    assert seats(tmp_path / "quarter-trials").total() == 6
    assert round(float(said.split()[-1])) == 6  # clients, of which all fit, on the node with that label
    train(toy_config(**settings), tmp_path / "here")
    for name in runs:
        assert sha(tmp_path / f"run-{name}") == sha(tmp_path / "here"), name
