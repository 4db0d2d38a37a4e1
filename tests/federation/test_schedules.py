"""A round's result is a function of the plan: not of blocks, order of arrival, losses or repetitions."""

import os
import pickle
import random
from collections import Counter
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from runs import CHAOS, AnySize, Memories, initial, train, trained, whole_round

from fedray.algorithms.ema import EMA
from fedray.federation.blocks import Pace, Queue
from fedray.federation.causes import Cause, Lost
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool, Reply
from fedray.federation.round import Session
from fedray.federation.worker import Worker, do
from fedray.record.run import Run
from fedray.vector import sha256_of

EXAMPLES = Path(__file__).parents[1] / "sockets/examples"
METHODS = {
    "fedavg": {},
    "scaffold": {"algorithm": "scaffold", "optimizer": "sgd"},
    "fednova": {"algorithm": "fednova", "optimizer": "sgd:momentum=0.5", "partition": "dirichlet:0.3"},
    "average of fedyogi, uniform": {"algorithm": "ema:0.9:fedyogi", "weights": "uniform", "partition": "dirichlet:0.3"},
    "fedprox-adaptive": {"algorithm": "fedprox-adaptive:0.1:patience=1"},
    "top-k, feedback": {"wire": "feedback:topk:0.25"},
    "ema, kept optimizers": {"algorithm": EMA(0.9), "keep_optimizer": True},
    "median, attackers": {"fold": "median", "wire": "int8", "malicious": "0.3:noise:1"},
}

MOST = ("fedavg", "scaffold", "top-k, feedback")  # without state, with state of clients, with that of links
assert METHODS.keys() >= set(MOST)


class Simulated:
    """A pool on a cluster that is simulated, where all that can go wrong does, as a seed says.

    Jobs take any time, and some ten times as long; actors and whole nodes are killed, and nodes join; the memory of a
    node is too small for several actors; a payload is lost on the way; a reply is late or comes twice, even in another
    round; what was given up for lost comes after all. Partials stay on their nodes, except on 0, the driver's: they are
    merged there in any tree, lost with the node, and come once or twice.
    """

    def __init__(self, config, rng):
        self.made = [Worker(config, torch.device("cpu"), f"worker {index}") for index in range(2)]
        self.rng, self.each, self.alive, self.joined = rng, 4, [0, 1], 2
        self.blamed, self.late = Counter(), []
        self.held = {}  # by node, the partials that lie there, each with the keys of its jobs
        self.suffered = Counter()  # causes
        self.merged = 0  # partials, on a node

    @property
    def nodes(self):
        return frozenset(map(str, self.alive))

    @property
    def workers(self):
        return self.each * len(self.alive)

    def map(self, work, shared, jobs, progress):
        jobs, running, now = enumerate(jobs), [], 0.0
        while True:
            while len(running) < self.workers and (item := next(jobs, None)) is not None:
                seconds = self.rng.expovariate(1.0) * self.rng.choice([1, 1, 1, 10])
                running.append((now + seconds, *item, self.rng.choice(self.alive)))
            if not running:
                yield from self.gather(shared)
                return
            running.sort(key=lambda run: run[:2])
            now, index, job, node = running[0]
            fate = self.rng.random()
            if fate < 0.07 and len(self.alive) > 1:
                self.alive.remove(node)
                yield from (self.lost(run[1], run[2], Cause.NODE) for run in running if run[3] == node)
                running = [run for run in running if run[3] != node]
                held = self.held.pop(node, [])
                yield from (replace(self.lost(-1, None, Cause.NODE), holds=keys) for _, keys in held)
                continue
            running.pop(0)
            if fate < 0.14:
                self.alive.append(self.joined)
                self.joined += 1
            if fate > 0.9 and self.each > 1:
                lost, row = self.lost(index, job, Cause.MEMORY), {"cause": Cause.MEMORY, "actor": "", "seconds": 0.0}
                yield self.rng.choice([lost, replace(lost, lost="", row=row | {"error": "out of memory"})])
                continue
            row, payload = do(self.rng.choice(self.made), work, shared, job)
            yield from self.deliver(Reply(index, job, row, partial(self.open, node, payload, shared)))
            if self.late and self.rng.random() < 0.3:
                yield self.late.pop(self.rng.randrange(len(self.late)))

    def open(self, node, payload, shared):
        """Bring a payload; its partial may stay, by itself or merged with another that lies there."""
        payload = pickle.loads(pickle.dumps(payload))
        if shared.merge is None or node == 0 or node not in self.alive:
            return payload
        if not payload.keys:
            return payload._replace(partial=None)
        there, made, keys = self.held.setdefault(node, []), payload.partial, payload.keys
        if there and self.rng.random() < 0.7:
            made, keys = self.merge(shared, (made, keys), there.pop(self.rng.randrange(len(there))))
        there.append((made, keys))
        return payload._replace(partial=None)

    def merge(self, shared, first, second):
        self.merged += 1
        return shared.merge(self.rng.choice(self.made), shared, None, first[0], second[0]), first[1] + second[1]

    def gather(self, shared):
        """Bring what lies on nodes, merged to one partial on each, unless whoever merges is lost."""
        for node in list(self.held):
            parts = self.held.pop(node)
            if self.rng.random() < 0.1:
                yield from (replace(self.lost(-1, None, Cause.NODE), holds=keys) for _, keys in parts)
                continue
            if self.rng.random() < 0.8:
                parts = [reduce(partial(self.merge, shared), pickle.loads(pickle.dumps(parts)))]
            for made, keys in parts:
                reply = Reply(-1, None, {}, partial(pickle.loads, pickle.dumps(made)), holds=keys)
                fate = self.rng.random()
                yield replace(reply, fetch=vanish) if fate < 0.1 else reply
                if fate < 0.2:
                    self.late.append(reply)

    def lost(self, index, job, cause):
        self.suffered[cause] += 1
        return Reply(index, job, {}, vanish, cause.value, cause)

    def deliver(self, reply):
        """Deliver a reply, or lose it: no client so often that it would be left out."""
        fate, clients = self.rng.random(), [job.client for job in reply.job.jobs]
        fair = all(self.blamed[reply.job.jobs[0].round, client] < Queue.DEATHS - 1 for client in clients)
        if fate < 0.3 and fair:
            self.blamed.update((reply.job.jobs[0].round, client) for client in clients)
            yield self.lost(reply.index, reply.job, Cause.ACTOR) if fate < 0.2 else replace(reply, fetch=vanish)
        if fate < 0.1 or fate > 0.9:
            self.late.append(reply)
        if fate >= 0.3 or not fair:
            yield reply

    def make_room(self):
        self.each //= 2
        return True

    def printed(self, last=False):
        return {}

    def losses(self):
        return []

    def usage(self):
        return {}


def vanish():
    raise Lost("its payload did not arrive", Cause.ACTOR)


@pytest.fixture(params=METHODS)
def case(request, toy_config):
    settings = {"labels": 6, "failing": (2,), "fraction": 0.67, "local_epochs": 1, "learning_rate": 0.05}
    config = toy_config(**settings | METHODS[request.param])
    plan = make_plan(config)
    return config, plan, trained(config, plan, LocalPool(config), Pace()), request.param


def seeds_for(method):
    """FEDRAY_SEED=N replays a seed; `make chaos` tries ten times as many."""
    if "FEDRAY_SEED" in os.environ:
        return [int(os.environ["FEDRAY_SEED"])]
    most = 500 if method in MOST else 100
    return range(10 * most if CHAOS else most)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(3600 if CHAOS else 600)
def test_any_schedule_gives_the_same_bits(case):
    config, plan, expected, method = case
    seeds, suffered, merged = seeds_for(method), Counter(), 0
    for seed in seeds:
        rng = random.Random(seed)
        pool = Simulated(config, rng)
        assert trained(config, plan, pool, AnySize(rng)) == expected, f"replay it with FEDRAY_SEED={seed}"
        suffered += pool.suffered
        merged += pool.merged
    assert len(seeds) == 1 or merged > len(seeds) / 2 or (merged == 0 and config.fold.memory(plan.round(config, 0)))
    assert len(seeds) == 1 or min(suffered[cause] for cause in (Cause.NODE, Cause.MEMORY, Cause.ACTOR)) > len(seeds) / 2


class Losing(LocalPool):
    """A pool that loses client 1 so many times, for that cause; it can make room so often."""

    def __init__(self, config, times, cause, rooms):
        super().__init__(config)
        self.times, self.cause, self.rooms = times, cause, rooms

    def map(self, work, shared, jobs, progress):
        for reply in super().map(work, shared, jobs, progress):
            lost = self.times > 0 and any(job.client == 1 for job in reply.job.jobs)
            self.times -= lost
            yield replace(reply, lost="gone", cause=self.cause) if lost else reply

    def make_room(self):
        self.rooms -= 1
        return self.rooms >= 0


@pytest.mark.parametrize(
    ("cause", "times", "rooms", "outcome"),
    [
        *[(cause, 2, 0, "ok") for cause in (Cause.ACTOR, Cause.BROKEN, Cause.DEADLINE)],
        *[(cause, 3, 0, "its process was lost 3 times; at last: gone") for cause in (Cause.ACTOR, Cause.DEADLINE)],
        *[(cause, 50, 0, "ok") for cause in (Cause.NODE, Cause.PREEMPTION)],
        (Cause.MEMORY, 1, 0, "gone"), (Cause.MEMORY, 3, 3, "ok"), (Cause.MEMORY, 3, 2, "gone"),
    ],
)  # fmt: skip
def test_each_cause_has_its_own_budget(toy_config, cause, times, rooms, outcome):
    config = toy_config()
    pool = Losing(config, times, cause, rooms)
    state, row = whole_round(Session(config, plan := make_plan(config), pool, Memories()), initial(config, plan))
    assert [client["outcome"] for client in row["clients"]] == ["ok", outcome, "ok", "ok"]
    assert [loss["cause"] for loss in row["lost"]] == [cause] * times
    assert {tuple(loss["clients"]) for loss in row["lost"]} == {(1,)}


class Reopening(LocalPool):
    """A pool on whose node the partial of client 1 stays in round 2, and is lost; done again, the client fails."""

    workers = 4  # so a block has one client

    def __init__(self, config):
        super().__init__(config)
        self.times = 0

    def map(self, work, shared, jobs, progress):
        for reply in super().map(work, shared, jobs, progress):
            if reply.job.key != ("block", "train", 1, 1):
                yield reply
                continue
            self.times += 1
            if self.times > 1:
                row = {"error": "it fails", "cause": Cause.CLIENT, "actor": "", "node": "", "seconds": 0.0}
                yield replace(reply, row=row)
                continue
            parts = reply.fetch()
            yield replace(reply, fetch=lambda parts=parts: parts._replace(partial=None))
            yield Reply(-1, None, {}, vanish, "gone", Cause.NODE, parts.keys)


def test_a_client_whose_partial_is_lost_and_that_fails_then_keeps_its_memory_of_before(toy_config, tmp_path):
    config = toy_config(keep_optimizer=True, optimizer="sgd:momentum=0.5", evaluate_samples=0)
    pool, out = Reopening(config), tmp_path / "run"
    rows = train(config, out, pool=pool, rounds=2)
    assert pool.times == 2
    assert [client["outcome"] for client in rows[1]["clients"]] == ["ok", "it fails", "ok", "ok"]
    (loss,) = rows[1]["lost"]
    assert (loss["clients"], loss["cause"], loss["reason"]) == ([1], Cause.NODE, "gone")
    assert (rows[1]["ledger"]["retried"], rows[1]["ledger"]["failed"]) == (1, 1)
    train(config, tmp_path / "one", rounds=1)
    before, after = (Run(place).recall(1, generation) for place, generation in ((tmp_path / "one", 1), (out, 2)))
    assert before
    assert sha256_of(after) == sha256_of(before)
    assert sha256_of(Run(out).recall(0, 2)) != sha256_of(Run(tmp_path / "one").recall(0, 1))


def test_blocks_follow_measured_durations(toy_config):
    from collections import deque

    pace = Pace()
    assert pace.take(deque(range(100)), lambda client: 10, 2) == [0]  # nothing is known yet
    pace.seconds_per_step = 0.01
    assert len(pace.take(deque(range(100)), lambda client: 10, 2)) == 10  # a second's worth
    assert len(pace.take(deque(range(12)), lambda client: 10, 2)) == 3  # towards the end, a quarter of what is left
    assert len(pace.take(deque(range(3)), lambda client: 10, 2)) == 1
    pace.memory = 100_000_000
    assert len(pace.take(deque(range(100)), lambda client: 10, 2)) == 2
    pace.seconds_per_step, pace.memory = 5.0, 0
    assert len(pace.take(deque(range(100)), lambda client: 10, 2)) == 1
