"""Processes that tests kill, and machines of their own that tests give them."""

import os
import random
import signal
import subprocess
import threading
import time

import psutil
import pytest

from fedray.record.run import Run


def can_mount():
    """Tell whether a process can have file systems of its own."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs user namespaces")


def client_actors(above=None):
    """Return the ids of the processes of client actors below a process; by default, below this one."""
    found = []
    for process in psutil.Process(above).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ClientActor"):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


class OnePerRound(threading.Thread):
    """Kills a client actor of the run in `out` in each of its rounds, up to `within` seconds after its beginning."""

    def __init__(self, out, rounds, seed, within=1.0):
        super().__init__(daemon=True)
        self.out, self.rounds, self.rng, self.within = out, rounds, random.Random(seed), within
        self.killed, self.over = [], False

    def run(self):
        for number in range(self.rounds):
            while not self.over and (len(Run(self.out).rows) < number or not client_actors()):
                time.sleep(0.02)
            time.sleep(self.rng.uniform(0, self.within))
            while not self.over and not (running := client_actors()):
                time.sleep(0.02)
            if self.over:
                return
            self.killed.append(self.rng.choice(running))
            os.kill(self.killed[-1], signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.join()
