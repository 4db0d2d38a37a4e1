"""Tables of measurements: on the terminal, and for `all.py` in a file. The memory of processes."""

import itertools
import json
import os
import re
import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

FILE = "FEDRAY_BENCH_TABLES"  # of the environment: where `all.py` wants the tables


def spread(values: list[float], digits: int = 3) -> str:
    """Write the median of some values, and the least and the largest."""
    middle, least, most = (f"{value:,.{digits}g}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown, and keep it."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(text)
    if FILE in os.environ:
        path = Path(os.environ[FILE])
        kept = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*kept, text]))


def memory(pid: int | str) -> dict[str, int]:
    """Return what a process holds, in bytes, where several share a page each its part.

    private: what it has written, but for shared segments;  shared: those, as Ray's object store;  files: mapped ones.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {
        kind: int(kilobytes) * 1024 for kind, kilobytes in re.findall(r"^Pss_(\w+): *(\d+) kB", text, re.MULTILINE)
    }
    return {"private": found["Anon"], "shared": found["Shmem"], "files": found["File"]}


def actors_of(kind: str) -> list[int]:
    """Find the processes of this process's own Ray that are actors of that class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and f"ray::{kind}" in process.cmdline()[0]:
                found.append(process.pid)
    return found


class Peak(threading.Thread):
    """The most that processes hold while a block runs, in bytes by process, each kind of `memory` by itself."""

    def __init__(self, pids: Callable[[], Sequence[int | str]] = lambda: ["self"]) -> None:
        super().__init__(daemon=True)
        self.pids, self.ended = pids, threading.Event()
        self.private: dict[int | str, int] = {}
        self.shared: dict[int | str, int] = {}
        self.files: dict[int | str, int] = {}

    def look(self, pids: Sequence[int | str]) -> None:
        for pid in pids:
            with suppress(OSError, KeyError):  # it has ended
                for kind, held in memory(pid).items():
                    most = getattr(self, kind)
                    most[pid] = max(most.get(pid, 0), held)

    def run(self) -> None:
        pids = self.pids()
        for count in itertools.count(1):
            if self.ended.wait(0.03):
                return
            if count % 20 == 0:  # to find processes takes longer than to look at them
                pids = self.pids()
            self.look(pids)

    def __enter__(self) -> "Peak":
        self.look(self.pids())
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
