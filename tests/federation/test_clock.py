"""Where the seconds of a round went: rows of runs in which each part is made to take a while."""

import math
import time
from dataclasses import dataclass

import pytest
from runs import train

from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.folds import Mean
from fedray.federation.clock import Clock
from fedray.federation.pool import LocalPool
from fedray.record.run import Run

PARTS = ("training", "waiting", "transfer", "fold", "server", "record")
PAUSE = 0.05


@dataclass(frozen=True)
class SlowServer(FedAvg):
    def aggregate(self, server, folded, round):
        time.sleep(PAUSE)
        return super().aggregate(server, folded, round)


@dataclass(frozen=True)
class SlowFold(Mean):
    def merge(self, partial, other, round):
        time.sleep(PAUSE)
        return super().merge(partial, other, round)


class LatePool(LocalPool):
    """Its workers come late to a map, and its results are long underway."""

    def map(self, work, shared, jobs, progress):
        time.sleep(PAUSE)
        for reply in super().map(work, shared, jobs, progress):
            time.sleep(2 * PAUSE)
            yield reply


def assert_sums(row):
    seconds = row["seconds"]
    assert math.fsum(seconds[part] for part in PARTS) == pytest.approx(seconds["round"], rel=1e-9)
    assert min(seconds.values()) >= 0


def test_parts_of_rows_sum_to_the_round_and_have_what_took_long(toy_config, tmp_path):
    config = toy_config(algorithm=SlowServer(), fold=SlowFold(), slow=(0, 1), pause=PAUSE, labels=2, local_epochs=1)
    rows = train(config, tmp_path / "run", pool=LatePool(config))
    assert [row["seconds"] for row in Run.open(tmp_path / "run").rows] == [row["seconds"] for row in rows]
    for row in rows:
        assert_sums(row)
        seconds, clients = row["seconds"], [client["seconds"] for client in row["clients"]]
        assert seconds["training"] >= math.fsum(clients) >= row["steps"] * PAUSE
        assert seconds["server"] >= PAUSE
        assert seconds["fold"] >= row["ledger"]["folded"] * PAUSE
        assert seconds["waiting"] >= PAUSE
        assert seconds["transfer"] >= 2 * PAUSE * len(clients)


def test_what_a_tracker_takes_between_blocks_is_not_time_of_clients():
    """A row is shown beside the next round's first block, where its checkpoint was not durable before."""
    clock = Clock()
    for _ in clock.during("clients", range(3)):
        with clock.on("record"):
            time.sleep(PAUSE)
    seconds = clock.seconds(1)
    assert seconds["record"] >= 3 * PAUSE
    assert seconds["waiting"] < seconds["record"]
    assert seconds["training"] == 0.0


def test_the_mean_over_workers_trains_and_the_rest_waits():
    clock = Clock()
    for took in clock.during("clients", (time.sleep(pause) or pause for pause in (0.04, 0.04))):
        clock.job(took, took)
    seconds = clock.seconds(2)
    assert seconds["training"] == pytest.approx(0.04)
    assert seconds["waiting"] >= 0.04 - 1e-9
    assert seconds["transfer"] == 0.0


def test_prompts_scores_and_checkpoints_are_beside_the_round(toy_config, tmp_path):
    rows = train(toy_config(evaluate_every=2), tmp_path / "run")
    assert ["evaluate" in row["seconds"] for row in rows] == [False, True, True]
    assert all(row["seconds"]["save"] > 0 for row in rows)
    total = Run.open(tmp_path / "run").result["seconds"]
    names = {"round", "save", "evaluate", "validate"}
    assert total == pytest.approx(sum(value for row in rows for name, value in row["seconds"].items() if name in names))
