"""Partials that stay on a node until the round ends, and what is lost with whoever merges them."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray as ray_itself
from runs import renew, whole_round

from fedray.algorithms.folds import Mean
from fedray.cluster.actors import Place
from fedray.cluster.calls import Actor, Call, Held
from fedray.cluster.crossing import Crossing
from fedray.cluster.messages import pack
from fedray.cluster.pool import RayPool
from fedray.federation.causes import Cause
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session
from fedray.federation.worker import Done, Parts, Shared
from fedray.record.checkpoint import State
from fedray.vector import sha256_of

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Deadly(Mean):
    """A mean: the process that merges the partials of at least `clients` ends, once for each file in `folder`."""

    folder: str = ""
    clients: int = 0

    def merge(self, first, second, round):
        merged = super().merge(first, second, round)
        lives = list(Path(self.folder).iterdir())
        if lives and len(merged.rows) >= self.clients and os.getpid() != int(lives[0].name.split("-")[0]):
            lives[0].unlink()
            os._exit(1)
        return merged


class Memories:
    def generation(self, client, rounds):
        return None

    def recall(self, client, generation):
        return {}

    def remember(self, client, generation, memory):
        assert not memory


def test_a_merge_that_is_lost_costs_no_client_that_was_done(ray, toy_config, tmp_path):
    ray.cloudpickle.register_pickle_by_value(__import__("test_crossing"))
    pool = RayPool.start(toy_config(actors=2))
    pool._crossing.here = "elsewhere"  # so this node is another than the driver's
    settings = {"labels": 8, "local_epochs": 1, "slow": tuple(range(8)), "pause": 0.2, "actors": 2}
    try:
        for deaths, clients, partials in (
            (0, 0, 1),
            (1, 2, 1),  # as a job goes on with what another has left: that is there still
            (1, 8, 2),  # as all are merged: each comes by itself
        ):
            folder = tmp_path / f"{deaths}-{clients}"
            folder.mkdir()
            for number in range(deaths):
                (folder / f"{os.getpid()}-{number}").touch()
            config = toy_config(**settings, fold=Deadly(folder=str(folder), clients=clients))
            plan = make_plan(config)
            state = State(0, config.method.init(plan.initial, plan.layout))
            expected, _ = whole_round(Session(config, plan, LocalPool(replace(config, actors=0)), Memories()), state)
            renew(pool, config)
            list(pool.map(wait, Shared({}), [Job(0), Job(1)], lambda done: None))  # both have started
            after, row = whole_round(Session(config, plan, pool, Memories()), state)
            assert not pool._crossing.nodes  # nothing is left there
            assert not list(folder.iterdir())
            assert sha256_of(after.tensors) == sha256_of(expected.tensors)
            assert [client["outcome"] for client in row["clients"]] == ["ok"] * 8
            assert {loss["cause"] for loss in row["lost"]} <= {"actor died"}
            assert len([client for loss in row["lost"] for client in loss["clients"]]) <= deaths
            (there,) = row["nodes"].values()
            assert there["partials"] == partials
            assert row["bytes_crossed"] == there["bytes_to"] + there["bytes_from"] > 0
    finally:
        pool.close()


@dataclass(frozen=True)
class Job:
    number: int

    @property
    def key(self):
        return ("wait", self.number)


def wait(worker, shared, job):
    time.sleep(1.0)
    return {}, None


@pytest.fixture
def crossing(ray):
    crossing = Crossing()
    crossing.here = "elsewhere"
    return crossing


def call_on(node, keys, onto=None):
    """A call of an actor on a node, that is done."""
    actor = Actor.__new__(Actor)
    actor.place, actor.done, actor.rests = Place(node, "", {}), Done(0, 0), 0.0
    payload, partial = ray_itself.put(pack(Parts("now", None, keys))), ray_itself.put(pack("partial"))
    return Call(0, "job", payload, partial, onto, actor, 0.0)


def test_what_a_job_goes_on_with_is_kept_until_its_reply_is_fetched(crossing):
    shared = Shared({}, merge=lambda *partials: None)
    first = call_on("there", (("a",),))
    assert crossing.open(first, shared) == Parts("now", None, (("a",),))
    crossing.end(first)
    onto = crossing.begin(first.actor, "job", shared)
    assert onto.keys == (("a",),)
    assert crossing.begin(first.actor, "job", shared) is None  # another job begins anew
    lost = call_on("there", (("b",),), onto)
    crossing.end(lost)  # without being fetched
    assert crossing.begin(first.actor, "job", shared) is onto
    second = call_on("there", (("b",),), onto)
    crossing.open(second, shared)
    crossing.end(second)
    (reply,) = crossing.gather(["there"], [], None)
    assert sorted(reply.holds) == [("a",), ("b",)]
    assert reply.fetch() == "partial"
    assert not crossing.nodes
    usage = crossing.usage()["there"]
    assert usage["partials"] == 1
    assert usage["bytes_from"] == 2 * pack(Parts("now", None, (("a",),))).nbytes + pack("partial").nbytes


def test_a_partial_of_no_client_is_not_kept(crossing):
    call = call_on("there", ())
    crossing.open(call, Shared({}, merge=lambda *partials: None))
    assert not crossing.nodes


def test_what_may_not_stay_comes_at_once(crossing):
    for shared, here in ((Shared({}), "elsewhere"), (Shared({}, merge=lambda *partials: None), "there")):
        crossing.here = here
        assert crossing.open(call_on("there", (("a",),)), shared).partial == "partial"
        assert not crossing.nodes


def test_partials_of_a_node_that_died_are_told_lost(crossing):
    @ray_itself.remote(num_cpus=0, max_restarts=0)
    class Ends:
        def merge(self, *partials):
            os._exit(1)

    there, actor = call_on("there", ()), Ends.remote()
    there.actor.handle = actor
    missing = [Held(actor.merge.remote(), (("a",),)), Held(ray_itself.put(pack("partial")), (("b",),))]
    for held in missing:
        crossing._held["there"].append(held)
    # It is no node of this cluster, so all of it counts as a node's death.
    (reply,) = crossing.gather(["there"], [there.actor], None)
    assert (reply.cause, sorted(reply.holds)) == (Cause.NODE, [("a",), ("b",)])
    assert reply.lost == "its node there died"
