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


class BackOff:
    """How long a place waits for its next process: not at all at first, and twice as long for each that ends in a row.

    The waits are the place's own: no client's deadline, failure or loss.
    """

    FIRST, LONGEST = 0.5, 10.0  # seconds

    def __init__(self) -> None:
        self.ended = 0  # processes in a row, without a result of any

    def wait(self, cause: Cause) -> float:
        """Take note that a process ended; return the seconds until there may be another."""
        if cause in BLAMELESS:
            return 0.0
        self.ended += 1
        return 0.0 if self.ended < 2 else min(self.FIRST * 2 ** (self.ended - 2), self.LONGEST)

    def over(self) -> None:
        """Take note of a result."""
        self.ended = 0


class Lost(Exception):
    """A payload that is lost, with the process that made it."""

    def __init__(self, reason: str, cause: Cause) -> None:
        super().__init__(reason)
        self.cause = cause
