"""The pool on a Ray that is simulated, clock included: places whose processes end again and again."""

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from fedray.cluster import calls, crossing, logs, nodes, pool
from fedray.cluster.actors import Place
from fedray.cluster.logs import Printed
from fedray.cluster.messages import pack
from fedray.cluster.pool import RayPool
from fedray.errors import RunError
from fedray.federation.causes import BackOff, Cause
from fedray.federation.worker import Done, Shared
from fedray.record.provenance import versions

START, JOB = 3.0, 1.0  # seconds


class Ref:
    """A result that is there from some time on."""

    def __init__(self, at, value):
        self.at, self.value = at, value


class Ray:
    """As much of Ray as the pool uses: one node, jobs that take a second, processes that start in three.

    sick: actors of these numbers end with each job that they begin.
    """

    def __init__(self, sick):
        self.now, self.sick, self.made, self.lost = 0.0, set(sick), [], 0
        self.util = SimpleNamespace(get_current_placement_group=lambda: None)

    def remote(self, **options):
        def actor(settings, index, *data):
            self.made.append((index, self.now))
            return SimpleNamespace(
                place=self.method(lambda: Ref(self.now + START, Place("node", "", versions()))),
                progress=self.method(lambda read: Ref(self.now, (Done(0, 0), Printed()))),
                do=self.method(lambda *arguments: self.job(index)),
                _actor_id=b"",
            )

        return lambda cls: SimpleNamespace(options=lambda **options: self.method(actor))

    def method(self, call):
        return SimpleNamespace(remote=call)

    def job(self, index):
        self.lost += index in self.sick
        value = ActorDiedError() if index in self.sick else {"actor": f"actor {index}"}
        return Ref(self.now + JOB, value), Ref(self.now + JOB, pack(None)), Ref(self.now + JOB, pack(None))

    def get_runtime_context(self):
        return SimpleNamespace(get_actor_id=lambda: None, get_node_id=lambda: "node")

    def put(self, value):
        return value

    def wait(self, refs, num_returns=1, timeout=None, fetch_local=True):
        if timeout:
            self.now = max(self.now, min([*(ref.at for ref in refs), self.now + timeout]))
        ready = [ref for ref in refs if ref.at <= self.now]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref, timeout=None):
        assert ref.at <= self.now
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, handle):
        pass

    def nodes(self):
        return [{"NodeID": "node", "Alive": True, "Resources": {"CPU": 2}}]

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now


@pytest.fixture
def simulated(monkeypatch):
    def make(sick):
        ray = Ray(sick)
        for module in (pool, calls, crossing, logs, nodes):
            monkeypatch.setattr(module, "ray", ray)
        for module in (pool, calls, crossing):
            monkeypatch.setattr(module, "time", ray)
        monkeypatch.setattr(calls, "known_to_ray", lambda actor: {})
        monkeypatch.setattr(pool, "draining", frozenset)
        monkeypatch.setattr(crossing, "get_local_object_locations", lambda refs: {})
        monkeypatch.setattr(nodes, "available_resources_per_node", lambda: {})
        return ray

    return make


def do_all(ray_pool, jobs):
    """Do jobs, those that are lost again, and return the replies."""
    todo, replies = list(jobs), []

    def drawn():
        while todo:
            yield todo.pop(0)

    while todo:
        for reply in ray_pool.map(None, Shared({}), drawn(), lambda steps: None):
            replies.append(reply)
            if reply.lost:
                todo.append(reply.job)
    return replies


def test_a_place_whose_processes_end_is_waited_with_longer_and_longer(simulated, toy_config):
    ray = simulated(sick=[0])
    ray_pool = RayPool.start(toy_config(actors=2))
    replies = do_all(ray_pool, range(400))
    assert sorted(reply.job for reply in replies if not reply.lost) == list(range(400))
    assert sum(bool(reply.lost) for reply in replies) == ray.lost  # a wait is nobody's loss
    times = [at for index, at in ray.made if index == 0]
    assert [index for index, _ in ray.made if index != 0] == [1]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    slack = 2 * pool.POLL
    for number, gap in enumerate(gaps):  # START + JOB, and the wait: 0, 0.5, 1, 2, 4, 8, 10, 10 … seconds
        wait = min(2.0 ** (number - 2), 10.0) if number else 0.0
        assert START + JOB + wait <= gap <= START + JOB + wait + slack, number
    assert len(times) > 12
    assert ray.now < 400 * JOB + START + 2 * JOB  # the other place is not held up
    waits = [loss["reason"] for loss in ray_pool.losses()]
    assert waits[0] == "2 processes in a row ended as actor 0; the next is made in 0.5 s"
    assert len(waits) == ray.lost - 1

    ray.sick.clear()  # it is well again: a result, and the next end costs no wait
    do_all(ray_pool, range(40))
    ray.sick.add(0)
    del ray.made[:]
    do_all(ray_pool, range(3))
    assert [index for index, _ in ray.made] == [0]
    assert ray_pool.losses() == []


def test_where_all_places_wait_so_does_the_pool_and_then_gives_up(simulated, toy_config):
    ray = simulated(sick=[0, 1])
    with pytest.raises(RunError, match="client actors end again and again. 3: its process ended"):
        do_all(RayPool.start(toy_config(actors=2)), [3])
    assert len(ray.made) == pool.IN_A_ROW + 2
    assert ray.now > 60


@pytest.mark.parametrize("cause", [Cause.NODE, Cause.PREEMPTION])
def test_nodes_that_go_cost_their_places_no_wait(cause):
    back_off = BackOff()
    assert [back_off.wait(cause) for _ in range(9)] == [0.0] * 9
    assert [back_off.wait(Cause.ACTOR) for _ in range(8)] == [0, 0.5, 1, 2, 4, 8, 10, 10]
    assert [back_off.wait(each) for each in (cause, Cause.DEADLINE)] == [0, 10]
    back_off.over()
    assert back_off.wait(Cause.START) == 0
