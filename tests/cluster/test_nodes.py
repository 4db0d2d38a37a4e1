"""How many actors fit into nodes, and what each has of them; without Ray."""

from dataclasses import replace

import pytest

from fedray.cluster import nodes
from fedray.cluster.nodes import Share, assign, count_actors
from fedray.errors import UserError


def these(monkeypatch, *each, dead=()):
    """Have a cluster of these nodes, given as (CPUs, GPUs)."""
    listed = [(True, cpus, gpus) for cpus, gpus in each] + [(False, cpus, gpus) for cpus, gpus in dead]
    rows = [
        {
            "NodeID": str(index), "Alive": lives, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            "Labels": {"ray.io/accelerator-type": "A100"} if gpus else {},
        }
        for index, (lives, cpus, gpus) in enumerate(listed)
    ]  # fmt: skip
    monkeypatch.setattr(nodes.ray, "nodes", lambda: rows)


def test_an_actor_is_on_one_node(toy_config, monkeypatch):
    config = toy_config(actors=None, cpus_per_actor=2.6)
    these(monkeypatch, (8, 0), (2, 0), (2, 0))
    assert count_actors(config) == 3
    with pytest.raises(
        UserError, match=r"--actors 4 needs 10.4 CPUs, and there are 12 CPUs \(8 on the largest node\) .* at most 3 fit"
    ):
        count_actors(replace(config, actors=4))
    these(monkeypatch, (2, 0), (2, 0), (2, 0))
    with pytest.raises(UserError, match="at most 0 fit"):
        count_actors(config)


def test_dead_nodes_do_not_count(toy_config, monkeypatch):
    these(monkeypatch, (2, 0), dead=[(8, 4)])
    assert count_actors(toy_config(actors=None, labels=100)) == 2
    with pytest.raises(UserError, match="no GPU"):
        count_actors(toy_config(actors=None, gpus_per_actor=1.0))


def test_only_nodes_with_the_label_count(toy_config, monkeypatch):
    these(monkeypatch, (8, 0), (2, 1), (3, 2), dead=[(4, 4)])
    config = toy_config(actors=None, labels=100, node_label="ray.io/accelerator-type=A100")
    config.check()
    assert count_actors(config) == 5
    assert count_actors(replace(config, gpus_per_actor=0.5, cpus_per_actor=0.5)) == 6
    with pytest.raises(UserError, match="--actors 6 needs 6 CPUs, and there are 5 CPUs"):
        count_actors(replace(config, actors=6))
    with pytest.raises(UserError, match="--node-label ray.io/accelerator-type=T4: no node .* has this label"):
        count_actors(replace(config, node_label="ray.io/accelerator-type=T4"))
    for wrong in ("A100", "a=", "=b", "a=b=c"):
        with pytest.raises(UserError, match=f"--node-label '{wrong}': it must be KEY=VALUE"):
            replace(config, node_label=wrong).check()


@pytest.mark.parametrize(
    ("share", "count", "places"),
    [
        (Share(1, 0), 2, "aa"),  # the driver's node, as long as it has room
        (Share(1, 0), 3, "aac"),  # then the largest
        (Share(1, 0), 7, "aaccccb"),
        (Share(1, 0), 9, "aaccccb"),  # no more fit
        (Share(1, 1), 2, "cc"),  # on one node, where it has two GPUs
        (Share(1, 0.5), 5, "ccccb"),
        (Share(0.25, 0.25), 9, "cccccccc" "b"),
        (Share(3, 0), 1, "c"),
    ],
)  # fmt: skip
def test_actors_are_on_as_few_nodes_as_will_do(share, count, places):
    nodes = {"a": {"CPU": 2}, "b": {"CPU": 1, "GPU": 1}, "c": {"CPU": 4, "GPU": 2}}
    assert assign(share, nodes, "a", count) == list(places)


@pytest.mark.parametrize(
    ("gpus", "cpus", "fit"),
    [
        (1.0, 0.1, 4), (2.0, 0.1, 1), (0.5, 0.1, 8), (0.25, 0.1, 16), (0.333, 0.1, 12), (0.33, 0.1, 12),
        (1 / 3, 0.1, 12), (0.17, 0.1, 24), (0.25, 2, 6),
    ],
)  # fmt: skip
def test_actors_that_share_gpus(toy_config, monkeypatch, gpus, cpus, fit):
    these(monkeypatch, (8, 3), (4, 1))
    config = toy_config(actors=None, gpus_per_actor=gpus, cpus_per_actor=cpus, labels=100)
    config.check()
    assert count_actors(config) == fit


@pytest.mark.parametrize(("gpus", "better"), [(0.3, "0.25 or 0.333"), (0.7, "0.5 or 1"), (0.15, "0.143 or 0.167")])
def test_other_fractions_are_refused(toy_config, gpus, better):
    with pytest.raises(UserError, match=f"--gpus-per-actor {gpus}: .* may let some wait for ever; give {better}"):
        toy_config(gpus_per_actor=gpus).check()


@pytest.mark.parametrize(
    ("share", "actors", "nodes", "larger"),
    [
        (Share(1, 0), 8, [(8, 0)], Share(2, 0)),
        (Share(1, 0), 2, [(8, 0)], Share(8, 0)),  # four CPUs each would leave both there
        (Share(1, 0), 3, [(8, 0), (2, 0)], Share(4, 0)),
        (Share(1, 0), 1, [(8, 0)], None),
        (Share(5, 0), 2, [(8, 0), (8, 0)], None),  # one on each
        (Share(2, 0.25), 4, [(16, 1)], Share(2, 0.5)),
        (Share(2, 1 / 3), 1, [(16, 1)], Share(2, 1)),  # an actor alone has a third of the GPU's memory, too
        (Share(2, 1), 4, [(16, 4)], None),
        (Share(2, 4), 1, [(16, 4)], None),
        (Share(1, 0), 4, [], None),
    ],
)
def test_fewer_actors_share_a_memory(share, actors, nodes, larger):
    cluster = {str(index): {"CPU": cpus, "GPU": gpus} for index, (cpus, gpus) in enumerate(nodes)}
    assert share.with_room(actors, cluster) == (larger or share)


def told(**share):
    return {"lost": [{"clients": [1]}, {"clients": [], "share": share}]}


def test_rows_tell_what_actors_had_at_last():
    rows = [told(cpus=2, gpus=0.5), {"lost": []}, {}, told(cpus=4, gpus=0.25), {"lost": [{"clients": []}]}]
    assert Share(1, 0.125).at_last(rows) == Share(4, 0.25)
    assert Share(1, 1).at_last(rows) == Share(4, 1)  # never less than was asked for
    assert Share(1, 0).at_last(rows[1:3]) == Share(1, 0)
