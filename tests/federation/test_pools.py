import time

import made
import numpy as np
import pytest
import torch

from fedray.errors import RunError, UserError
from fedray.federation.local import TrainJob, client_update
from fedray.federation.pool import LocalPool, Reply, in_order
from fedray.federation.worker import Shared
from fedray.vector import Layout


def replies(order):
    for index in order:
        yield Reply(index, f"job {index}", {}, lambda: None)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_in_order(order):
    assert [reply.index for reply in in_order(replies(order))] == [0, 1, 2, 3]


def test_in_order_does_not_wait_for_later_ones():
    source = replies([1, 0, 3, 2])
    ordered = in_order(source)
    assert next(ordered).index == 0
    assert next(source).index == 3  # it had not been asked for


def test_a_gpu_that_is_not_there(toy_config):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--gpus-per-actor 1: this machine has no GPU"):
        LocalPool(toy_config(gpus_per_actor=1.0))


def jobs_of(config, clients, drawn):
    labels = config.task.dataset().labels
    for client in range(clients):
        drawn.append(client)
        yield TrainJob(0, client, (labels == client).nonzero()[0], np.array([], int))


@pytest.fixture
def ray_pool(ray):
    from fedray.cluster.pool import RayPool

    pools = []

    def make(config):
        pools.append(RayPool.start(config))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def shared(config):
    """A model of zeros, which goes down to all clients."""
    layout = Layout(("weight",), ((1, config.task.size),))
    round = made.round_of(dict.fromkeys(range(config.clients), 8), layout)
    return Shared({"model": torch.zeros(config.task.size).numpy()}, round)


def map_toy(pool, config, clients, drawn):
    return pool.map(client_update, shared(config), jobs_of(config, clients, drawn), lambda done: None)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["failing", "slow"])
def test_nothing_waits_for_the_first_job(ray_pool, toy_config, first):
    """Client 0 fails first, or is far slower than all others: jobs are drawn only as actors are free."""
    config = toy_config(actors=2, labels=12, **{first: (0,)})
    pool, drawn, answered = ray_pool(config), [], []
    for reply in map_toy(pool, config, 12, drawn):
        answered.append(reply.index)
        assert len(drawn) - len(answered) <= pool.workers
        assert reply.ok == (first == "slow" or reply.index > 0)
    assert sorted(answered) == list(range(12))
    assert answered.index(0) == 11 if first == "slow" else answered.index(0) < 2


def test_a_dead_actor_is_a_named_error(ray_pool, toy_config, ray):
    config = toy_config(actors=2, slow=(0, 1, 2, 3), local_epochs=50)
    pool = ray_pool(config)
    answers = map_toy(pool, config, 4, [])
    started = time.monotonic()

    def kill_one(done):
        ray.kill(pool.actors[0])

    answers = pool.map(client_update, shared(config), jobs_of(config, 4, []), kill_one)
    with pytest.raises(RunError, match="the client actor doing client [01] in round 1 died: its process ended"):
        list(answers)
    assert time.monotonic() - started < 30


def test_an_actor_that_died_while_idle_is_a_named_error(ray_pool, toy_config, ray):
    config = toy_config(actors=1)
    pool = ray_pool(config)
    ray.kill(pool.actors[0])
    with pytest.raises(RunError, match=r"the client actor doing its progress .actor 0. died: its process ended"):
        list(map_toy(pool, config, 4, []))


@pytest.mark.slow
def test_a_client_that_does_not_answer_is_a_named_error(ray_pool, toy_config):
    config = toy_config(actors=2, slow=(1,), local_epochs=100, client_timeout=2.0)
    pool = ray_pool(config)
    with pytest.raises(RunError, match="client 1 in round 1 has not answered for 2 s"):
        list(map_toy(pool, config, 4, []))


def test_progress_counts_steps(ray_pool, toy_config):
    config = toy_config(actors=1, slow=(0,), local_epochs=1)
    seen = []
    list(ray_pool(config).map(client_update, shared(config), jobs_of(config, 1, []), seen.append))
    assert seen
    assert seen == sorted(seen)
    assert 0 < max(seen) <= config.steps(8)
