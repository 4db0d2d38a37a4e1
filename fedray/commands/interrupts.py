"""Ctrl-C and SIGTERM: the first stops what runs, in good order; the second ends this process at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Raise `KeyboardInterrupt` at the first signal, and end this process at the second; yield a list of those caught.

    Signals that are ignored, as a shell does for jobs in the background, stay so.
    """
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        os.write(2, b"\nstopping; once more to end at once\n")  # print may be what was interrupted
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(each, stop)
    try:
        yield caught
    finally:
        if not caught:  # else this process is ending, and a second signal still ends it at once
            for each, handler in before.items():
                signal.signal(each, handler)
