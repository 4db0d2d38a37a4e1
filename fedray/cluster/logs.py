"""What actors print: read from the files that Ray leads their stdout and stderr to, on the nodes where these are."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.cluster.nodes import SHORT, alive

MOST = 16_384  # bytes of a file that travel at a time: of what is printed faster, the last
KEPT = 4 * MOST  # characters of an actor that wait to be written
TIMEOUT = 10.0  # seconds for another node to read a file
NOISE = (":job_id:", ":actor_name:", ":task_name:")  # Ray's marks


class Printed(NamedTuple):
    """What a process has printed since the last look, and how far its two files are read now."""

    text: str = ""
    read: tuple[int, int] = (0, 0)


def stderr_file() -> str:
    """Return the file that Ray leads this process's stderr to, "" if there is none."""
    try:
        return os.readlink("/proc/self/fd/2")
    except OSError:
        return ""


def printed(stderr: str, read: tuple[int, int], last: bool = False) -> Printed:
    """Read on in the files of a process, whole lines only.

    Args:
        last: nothing will follow; a line that was not ended is taken too.
    """
    if not stderr.endswith(".err"):
        return Printed("", read)
    files = (stderr.removesuffix(".err") + ".out", stderr)
    (out, there), (err, then) = (_read_on(file, begin, last) for file, begin in zip(files, read, strict=True))
    return Printed(out + err, (there, then))


def _read_on(path: str, begin: int, last: bool) -> tuple[str, int]:
    """Return the lines of a file from there on, and where they end."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            left_out = max(0, size - MOST - begin)
            file.seek(begin + left_out)
            data = file.read(MOST)
    except OSError:
        return "", begin
    end = len(data) if last or left_out else data.rfind(b"\n") + 1
    lines = [line for line in data[:end].decode(errors="replace").splitlines() if not line.startswith(NOISE)]
    if left_out:
        lines.insert(0, f"… {left_out:,} bytes left out …")
    return "".join(f"{line}\n" for line in lines), begin + left_out + end


class Log:
    """What one of a pool's actors has printed, the one that replaced it, and so on, until that is taken."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._text = ""
        self._node, self._stderr = "", ""
        self.read = (0, 0)

    def begin(self, node: str, stderr: str) -> None:
        """Take note of where its process is."""
        self._node, self._stderr, self.read = node, stderr, (0, 0)
        self._add(f"--- on node {node[:SHORT]} from {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    def hear(self, found: Printed) -> None:
        """Take note of what it says that it has printed."""
        self.read = found.read
        self._add(found.text)

    def end(self) -> None:
        """Take note of what a process that has ended printed last, if its node lives."""
        if self._stderr:
            self.hear(on_node(self._node, printed, self._stderr, self.read, True) or Printed("", self.read))
            self._stderr = ""

    def take(self) -> str:
        """Return what was printed since it was last taken."""
        text, self._text = self._text, ""
        return text

    def _add(self, text: str) -> None:
        self._text = (self._text + text)[-KEPT:]


class OwnLog(Log):
    """What this process prints, if it is an actor of Ray's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if ray.get_runtime_context().get_actor_id() is not None:
            self._stderr = stderr_file()
            self.read = printed(self._stderr, (0, 0)).read  # it may have done another run before

    def take(self) -> str:
        self.hear(printed(self._stderr, self.read))
        return super().take()


class Logs:
    """What the processes of a pool have printed, those that have ended and the driver too."""

    def __init__(self) -> None:
        self._ended: list[Log] = []
        self._driver = OwnLog("driver")

    def keep(self, log: Log) -> None:
        """Keep what an actor had printed that the pool goes on without."""
        log.end()
        self._ended.append(log)

    def take(self, logs: Iterable[Log]) -> dict[str, str]:
        """Return what was printed since it was last taken, also to these logs, by name."""
        found: dict[str, str] = {}
        for log in [self._driver, *self._ended, *logs]:
            if text := log.take():
                found[log.name] = found.get(log.name, "") + text
        self._ended.clear()
        return found


def on_node(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that reads files of a node, there; return None where the node, or the file, does not answer."""
    with suppress(OSError, RayError):
        if node == ray.get_runtime_context().get_node_id():
            return function(*arguments)
        if node in alive():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            read = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
            return ray.get(read.remote(*arguments), timeout=TIMEOUT)
    return None
