"""Why work was lost: the causes that a round's record tells apart, each with a budget of its own."""

from enum import StrEnum


class Cause(StrEnum):
    """A cause, as it stands in the record."""

    CLIENT = "client"  # an exception, or weights that are not finite: --client-retries
    ACTOR = "actor died"
    BROKEN = "actor broken"  # it lives, and each job after this one would fail
    DEADLINE = "too slow"
    MEMORY = "out of memory"  # of a GPU or a node: alone, then with fewer actors beside it
    NODE = "node died"  # nobody's fault: as often as it happens
    PREEMPTION = "pre-emption"  # likewise
    START = "did not start"


BLAMELESS = frozenset({Cause.NODE, Cause.PREEMPTION})
COUNTED = frozenset({Cause.ACTOR, Cause.BROKEN, Cause.DEADLINE})  # what a client may have done to its process


class Lost(Exception):
    """A payload that is lost, with the process that made it."""

    def __init__(self, reason: str, cause: Cause) -> None:
        super().__init__(reason)
        self.cause = cause
