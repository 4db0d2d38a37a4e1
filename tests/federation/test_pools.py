import os
import signal
import time
from collections import Counter
from dataclasses import replace

import made
import numpy as np
import pytest
import torch
from runs import fit, renew, sha, train

import fedray
from fedray.errors import RunError, UserError
from fedray.federation.causes import Cause
from fedray.federation.local import TrainJob, client_update
from fedray.federation.pool import LocalPool, Reply, in_order
from fedray.federation.worker import Shared
from fedray.vector import Layout


class Scripted:
    """A pool that answers in that order, and loses each of some jobs once."""

    workers = 2

    def __init__(self, order, lost=()):
        self.order, self.lost, self.asked = order, set(lost), 0

    def map(self, work, shared, jobs, progress):
        jobs = list(jobs)
        for index in [index for index in self.order if index < len(jobs)]:
            self.asked += 1
            lost = "gone" if jobs[index] in self.lost else ""
            self.lost.discard(jobs[index])
            yield Reply(index, jobs[index], {}, lambda job=jobs[index]: job.upper(), lost)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("lost", ["", "a", "bd", "abcd"])
def test_in_order(order, lost):
    pool = Scripted(order, lost)
    found = list(in_order(pool, None, None, "abcd", None))
    assert [(reply.index, reply.job, reply.fetch()) for reply in found] == list(
        zip(range(4), "abcd", "ABCD", strict=True)
    )
    assert pool.asked == 4 + len(lost)


def test_in_order_does_not_wait_for_later_ones():
    pool = Scripted([1, 0, 3, 2])
    assert next(in_order(pool, None, None, "abcd", None)).index == 0
    assert pool.asked == 2


def test_what_is_lost_again_and_again_is_a_named_error():
    class Losing(Scripted):
        def map(self, *arguments):
            return (replace(reply, lost="gone") for reply in super().map(*arguments))

    with pytest.raises(RunError, match="a was lost 3 times; at last: gone"):
        list(in_order(Losing([0, 1]), None, None, "ab", None))


class Crowded:
    """A pool on which `b` and `c` are out of memory, as a row or with their process, until it made room so often."""

    workers = 2

    def __init__(self, times, most):
        self.times, self.most, self.made = times, most, 0

    def map(self, work, shared, jobs, progress):
        for index, job in enumerate(jobs):
            full = job in "bc" and self.made < self.times
            row = {"error": "out of memory", "cause": Cause.MEMORY} if full and job == "b" else {}
            yield Reply(index, job, row, lambda job=job: job.upper(), "full" * (full and job == "c"), Cause.MEMORY)

    def make_room(self):
        self.made += 1
        return self.made <= self.most


@pytest.mark.parametrize("times", [1, 2, 5])
def test_what_is_out_of_memory_is_done_again_as_long_as_there_is_room_to_make(times):
    found = [reply.fetch() for reply in in_order(Crowded(times, times), None, None, "abcd", None)]
    assert found == list("ABCD")
    replies = in_order(Crowded(times, times - 1), None, None, "abd", None)
    assert [reply.row.get("error") for reply in replies] == [None, "out of memory", None]


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
def test_nothing_waits_for_the_first_job(ray_pool, toy_config):
    """Client 0 fails first, or is far slower than all others: jobs are drawn only as actors are free."""
    configs = {first: toy_config(actors=2, labels=12, **{first: (0,)}) for first in ("failing", "slow")}
    pool = ray_pool(configs["failing"])
    for first, config in configs.items():
        renew(pool, config)
        drawn, answered = [], []
        for reply in map_toy(pool, config, 12, drawn):
            answered.append(reply.index)
            assert len(drawn) - len(answered) <= pool.workers
            assert reply.ok == (first == "slow" or reply.index > 0)
        assert sorted(answered) == list(range(12))
        assert first == "failing" or answered[-1] == 0


@pytest.mark.slow
def test_a_dead_actor_is_replaced_and_its_job_is_told_lost(ray_pool, toy_config, ray):
    """Progress counts steps, of the actor that took its place, too."""
    config = toy_config(actors=2, slow=(0, 1, 2, 3), local_epochs=1)
    pool, killed, seen = ray_pool(config), [], []
    list(map_toy(pool, toy_config(), 4, []))  # both have started

    def kill_one(done):
        if not killed:
            killed.append(pool.actors[0].handle)
            ray.kill(killed[0])

    answers = list(pool.map(client_update, shared(config), jobs_of(config, 4, []), kill_one))
    (lost,) = [reply.lost for reply in answers if reply.lost]
    assert lost.startswith("its process ended (killed, or out of memory)")
    assert sorted(reply.index for reply in answers) == [0, 1, 2, 3]
    assert pool.actors[0].handle is not killed[0]
    pool.actors[0].start(60)
    again = list(pool.map(client_update, shared(config), jobs_of(config, 4, []), seen.append))
    assert {reply.row["actor"] for reply in again} == {"actor 0", "actor 1"}
    assert seen == sorted(seen)
    assert 0 < max(seen) <= 4 * config.steps(8)


@pytest.mark.slow
def test_kills_and_deaths_cost_no_client_but_their_own(ray_pool, toy_config, ray, tmp_path):
    """Actors are killed in every round, client 1 ends its process, 2 breaks it: all others are undisturbed."""
    quiet = toy_config(labels=8, rounds=2, failing=(1, 2), keep_optimizer=True, evaluate_samples=0)
    train(quiet, tmp_path / "quiet")
    task = replace(quiet.task, failing=(), deadly=(1,), breaking=(2,))
    config = replace(quiet, task=task, actors=2)
    pool, rows = ray_pool(config), []
    for row in fit(config, pool, tmp_path / "run"):
        rows.append(row)
        ray.kill(pool.actors[len(rows) % 2].handle)
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")
    for row in rows:
        outcomes = {client["client"]: client["outcome"] for client in row["clients"]}
        assert [client for client in outcomes if outcomes[client] == "ok"] == [0, 3, 4, 5, 6, 7]
        assert outcomes[1].startswith("its process was lost 3 times; at last: its process ended (killed, or out of")
        assert outcomes[1].endswith("the end of its log: the camera is on fire")
        assert outcomes[2].startswith("its process was lost 3 times; at last: RuntimeError: CUDA error: an illegal")
        causes = {(client, loss["cause"]) for loss in row["lost"] for client in loss["clients"]}
        assert causes >= {(1, "actor died"), (2, "actor broken")}
        ledger, actors = row["ledger"], [loss for loss in row["lost"] if loss["actor"]]
        assert (ledger["asked"], ledger["folded"], ledger["failed"], ledger["nodes_lost"]) == (8, 6, 2, 0)
        assert ledger["actors_lost"] == len(actors) >= 6  # three for each


@pytest.mark.slow
def test_each_fault_costs_its_own_client_and_no_other(ray_pool, toy_config, tmp_path):
    """Exceptions, infinite and undefined weights, too little memory, hanging, crashing; and ten times as slow."""
    quiet = toy_config(labels=10, rounds=1, failing=(1, 2, 3, 4, 5, 6), keep_optimizer=True, evaluate_samples=0)
    train(quiet, tmp_path / "quiet")
    faults = {"failing": (1,), "infinite": (2,), "undefined": (3,), "hungry": (4,), "hanging": (5,), "crashing": (6,)}
    task = replace(quiet.task, **faults, slow=(7,), pause=0.5)
    config = replace(quiet, task=task, actors=2, client_timeout=9.0, client_retries=1)
    (row,) = fit(config, ray_pool(config), tmp_path / "run")
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")
    outcomes = {client["client"]: client["outcome"] for client in row["clients"]}
    assert [client for client in outcomes if outcomes[client] == "ok"] == [0, 7, 8, 9]
    lost = Counter((client, str(loss["cause"])) for loss in row["lost"] for client in loss["clients"])
    for client, said, cause, least in (
        (1, "ValueError: this client's camera is broken", "client", 1),
        (2, "FloatingPointError: the trained weights are not finite", "client", 1),
        (3, "FloatingPointError: the trained weights are not finite", "client", 1),
        (4, "UserError: client 4 in round 1 needs more GPU memory than it may have", "out of memory", 1),
        (5, "its process was lost 3 times; at last: it has not answered for 9 s (--client-timeout)", "too slow", 3),
        (6, "its process was lost 3 times; at last: its process ended (killed, or out of memory)", "actor died", 3),
    ):
        assert outcomes[client].startswith(said), client
        assert lost[client, cause] >= least, client
    assert "Segmentation fault" in outcomes[6]


@pytest.mark.slow
def test_who_is_out_of_memory_has_more_of_it_for_the_rest_of_the_run(ray_pool, toy_config, tmp_path):
    """Client 1 needs the memory of two actors: alone it has still too little, with half as many actors it has not."""
    train(toy_config(rounds=2, evaluate_samples=0), tmp_path / "quiet")
    config = toy_config(rounds=2, evaluate_samples=0, crowded=(1,), actors=2)
    pool = ray_pool(config)
    first, second = fit(config, pool, tmp_path / "run")
    pool.close()
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")
    assert {client["outcome"] for row in (first, second) for client in row["clients"]} == {"ok"}
    assert {(tuple(loss["clients"]), loss["cause"]) for loss in first["lost"]} == {
        ((1,), "out of memory"), ((), "out of memory"),
    }  # fmt: skip
    assert first["lost"][-1]["reason"] == "from now on each actor has 2 CPUs, so that fewer share the memory"
    assert first["lost"][-1]["share"] == {"cpus": 2, "gpus": 0}
    *_, third = fedray.run(replace(config, rounds=3), tmp_path / "run", resume=True).rows
    for row in (second, third):
        assert not row["lost"]
        assert [there["actors"] for there in row["nodes"].values()] == [1]


@pytest.mark.slow
def test_actors_that_do_not_start_are_told_and_come_when_there_is_room(ray_pool, toy_config, ray, tmp_path):
    """Somebody else has one of two CPUs, and goes when that was told."""

    class Other:
        def ready(self):
            return True

    other = ray.remote(num_cpus=1)(Other).remote()
    ray.get(other.ready.remote())
    config = toy_config(actors=2, rounds=8, slow=(0, 1, 2, 3), local_epochs=1, start_timeout=8.0, evaluate_samples=0)
    rows = []
    for row in fit(config, ray_pool(config), tmp_path / "run"):
        rows.append(row)
        if any(loss["cause"] == "did not start" for loss in row["lost"]):
            ray.kill(other)
    (told,) = [loss for row in rows for loss in row["lost"]]
    assert "did not start in 8 s (--start-timeout): 0 of 1 have their share of a node and are still" in told["reason"]
    assert "1 wait for one with 1 CPUs; free now: 0 CPUs and 0 GPUs; the run goes on with 1" in told["reason"]
    assert [sum(there["actors"] for there in rows[index]["nodes"].values()) for index in (0, -1)] == [1, 2]


@pytest.mark.slow
def test_a_process_that_is_stopped_is_found_by_its_clients_deadline(ray_pool, toy_config, ray):
    config = toy_config(actors=2, client_timeout=10.0)
    pool = ray_pool(config)
    pid = ray.get(pool.actors[0].handle.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    answers = list(pool.map(client_update, shared(config), jobs_of(config, 4, []), lambda done: None))
    lost = [(reply.lost, reply.cause) for reply in answers if reply.lost]
    assert lost == [("it has not answered for 10 s (--client-timeout)", Cause.DEADLINE)]
    assert time.monotonic() - started < 60
