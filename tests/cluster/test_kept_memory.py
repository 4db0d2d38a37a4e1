"""Processes of fedray's own Ray keep the memory that they free: a new vector costs no new pages."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import resource
import ray
from fedray.cluster.connection import connected
from fedray.memory import keep_freed_memory

@ray.remote(num_cpus=0, concurrency_groups={"progress": 1})  # as client actors: their jobs run in a thread
class Actor:
    def __init__(self):
        keep_freed_memory()

    def faults(self):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            b"x" * (80 << 20)  # more than a thread's own arena could keep
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with connected(None):
    actor = Actor.remote()
    ray.get(actor.faults.remote())
    print("faults", ray.get(actor.faults.remote()))
"""


@pytest.mark.slow
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="a page of 2 MB is one fault")
def test_an_actor_keeps_what_it_frees():
    ours = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=300, check=True)
    pages = 8 * (80 << 20) / resource.getpagesize()
    assert int(done.stdout.split("faults")[1]) < pages / 2  # one may not fit where others lay
