"""A long run with kills leaks neither memory, nor references, nor files. In `make soak`, ten minutes long."""

import os
import random
import signal
import statistics
import threading
import time

import psutil
import pytest
from killing import client_actors
from runs import fit

from fedray.cluster.pool import RayPool

SECONDS = 600 if os.environ.get("FEDRAY_SOAK") else 0
ROUNDS, KILLS = 90, 3  # at least: between the middle third and the last are 30 rounds
KILL_EVERY = 6.0 if SECONDS else 4.0  # seconds, on average
VECTOR = 800_000  # bytes of the model
LEAK = 15 * VECTOR  # what would leak in 15 rounds, were it one vector a round


class Killer(threading.Thread):
    """Kills client actors at random moments, except for the first."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.kills, self.over = None, 0, threading.Event()

    def run(self):
        rng = random.Random(0)
        while not self.over.wait(rng.expovariate(1 / KILL_EVERY)):
            running = client_actors()
            self.first = self.first or min(running, default=None)
            others = [pid for pid in running if pid != self.first]
            if others:
                os.kill(others[0], signal.SIGKILL)
                self.kills += 1


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows_in_a_long_run_with_kills(ray, toy_config, tmp_path):
    config = toy_config(
        size=VECTOR // 4, labels=6, fraction=0.5, rounds=100_000, local_epochs=1, keep_optimizer=True, use_ema=True,
        evaluate_samples=0, actors=2,
    )  # fmt: skip
    pool, killer, seen = RayPool.start(config), Killer(), []
    counts = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    try:
        killer.start()
        ends = time.monotonic() + SECONDS
        for row in fit(config, pool, tmp_path / "run"):
            assert [client["outcome"] for client in row["clients"]] == ["ok"] * 3
            private = [psutil.Process(pid).memory_full_info().uss for pid in (os.getpid(), killer.first) if pid]
            files = sum(path.is_file() for path in (tmp_path / "run").rglob("*"))
            seen.append([len(counts()), files, *private])
            if len(seen) >= ROUNDS and killer.kills >= KILLS and time.monotonic() > ends:
                break
    finally:
        killer.over.set()
        pool.close()
    assert killer.kills > SECONDS / KILL_EVERY / 4
    seen = [each for each in seen if len(each) == 4]
    third = len(seen) // 3
    print(f"\n{len(seen)} rounds, {killer.kills} kills")
    names = ("references", "files", "bytes of the driver", "bytes of an actor")
    for name, *values in zip(names, *seen, strict=True):
        early, late = (statistics.median(part) for part in (values[third : 2 * third], values[2 * third :]))
        print(f"{name}: from {early:,.0f} to {late:,.0f}")
        assert late - early < (LEAK if "bytes" in name else 10), name
