"""A round's result is a function of the plan: not of blocks, order of arrival, losses or repetitions."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import whole_round

from fedray.algorithms.ema import EMA
from fedray.federation.blocks import Pace, Queue
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool, Reply
from fedray.federation.round import Session
from fedray.federation.worker import Worker, do
from fedray.record.checkpoint import State
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


class Memories:
    """What a run directory keeps of clients, in memory."""

    def __init__(self):
        self.kept = {}

    def generation(self, client, rounds):
        return max((g for c, g in self.kept if c == client and g <= rounds), default=None)

    def recall(self, client, generation):
        return {} if generation is None else self.kept[client, generation]

    def remember(self, client, generation, memory):
        assert (client, generation) not in self.kept, "a memory was accepted twice"
        self.kept[client, generation] = {name: tensor.clone() for name, tensor in memory.items()}


class Shuffled:
    """A pool that answers in any order, loses replies, repeats them, and delivers lost ones after all."""

    def __init__(self, config, rng):
        self.made = [Worker(config, torch.device("cpu"), f"worker {index}") for index in range(3)]
        self.workers, self.rng, self.repeated = 3, rng, []

    def map(self, work, shared, jobs, progress):
        jobs, running = iter(jobs), []
        while True:
            while len(running) < self.workers and (job := next(jobs, None)) is not None:
                running.append(job)
            if not running:
                return
            job = running.pop(self.rng.randrange(len(running)))
            row, payload = do(self.rng.choice(self.made), work, shared, job)
            reply = Reply(0, job, row, partial(lambda value: value, payload))
            fate = self.rng.random()
            if fate < 0.3:
                yield replace(reply, lost="a cosmic ray")
            if fate < 0.1 or fate > 0.3:
                yield reply  # some that were given up for lost come late
            if fate > 0.9:
                self.repeated.append(reply)
            if self.repeated and self.rng.random() < 0.3:
                yield self.rng.choice(self.repeated)


class Any(Pace):
    """Blocks of any size."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng

    def take(self, todo, steps, workers):
        return [todo.popleft() for _ in range(self.rng.randint(1, len(todo)))]


def trained(config, plan, pool, pace, rounds=3):
    """The state, the memories and the rows after some rounds."""
    state, run, rows = State(0, config.method.init(plan.initial, plan.layout)), Memories(), []
    session = Session(config, plan, pool, run, pace=pace)
    for _ in range(rounds):
        state, row = whole_round(session, state)
        rows.append(row)
    memories = {f"{c}/{g}/{name}": t for (c, g), kept in run.kept.items() for name, t in kept.items()}
    told = [[(c["client"], c["outcome"], c.get("loss"), c["bytes_down"]) for c in row["clients"]] for row in rows]
    return sha256_of(state.tensors), sha256_of(memories), told, [row["loss"] for row in rows]


@pytest.fixture(params=METHODS)
def case(request, toy_config):
    config = toy_config(labels=6, failing=(2,), fraction=0.67, learning_rate=0.05, **METHODS[request.param])
    plan = make_plan(config)
    return config, plan, trained(config, plan, LocalPool(config), Pace())


def test_any_schedule_gives_the_same_bits(case, monkeypatch):
    monkeypatch.setattr(Queue, "DEATHS", 1000)  # these losses are no client's fault
    config, plan, expected = case

    @settings(max_examples=50, deadline=None, database=None)
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = random.Random(seed)
        assert trained(config, plan, Shuffled(config, rng), Any(rng)) == expected

    check()


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
