"""Why an actor ended: the cause, a sentence, and the end of its log."""

import os

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError

from fedray.cluster.logs import NOISE, on_node
from fedray.cluster.nodes import SHORT, alive
from fedray.federation.causes import Cause, Lost

ENDED = "its process ended (killed, or out of memory)"
LINES, LETTERS = 4, 400  # of a log


def explain(error: RayError, node: str = "", log: str = "") -> Lost:
    """Tell what an error of Ray's means for the work of an actor, on that node and with that file of its stderr."""
    said, where = str(error), f" {node[:SHORT]}" if node else ""
    if isinstance(error, OutOfMemoryError):
        return Lost(f"Ray ended its process, since the memory of its node{where} was full", Cause.MEMORY)
    if getattr(error, "preempted", False):
        return Lost(f"its node{where} was taken away", Cause.PREEMPTION)
    if "its node has died" in said or (node and node not in alive()):  # an actor, or what it had sent
        return Lost(f"its node{where} died", Cause.NODE)
    begun = not getattr(error, "actor_init_failed", False)
    if isinstance(error, ActorDiedError) and begun:
        last = on_node(node, read_tail, log) if log else ""
        return Lost(ENDED + (f"; the end of its log: {last}" if last else ""), Cause.ACTOR)
    return Lost(last_line(error), Cause.ACTOR if begun else Cause.START)


def last_line(error: RayError) -> str:
    """Pick the line of a Ray error that gives its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__


def read_tail(log: str) -> str:
    """Return the last lines of a file, without Ray's marks and the places in a traceback."""
    noise = (*NOISE, "File ", "Extension modules:")
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return " / ".join([line for line in lines if line and not line.startswith(noise)][-LINES:])[-LETTERS:]
