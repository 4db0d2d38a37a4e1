"""A connection to Ray: to a running cluster, or to a private one that ends with this process."""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from fedray import own
from fedray.errors import UserError

NAMESPACE = "fedray"
TOKEN = secrets.token_hex(32)  # of a private Ray; Ray reads it once per process
CONNECT_TIMEOUT = 10.0  # seconds for a cluster to answer at its address


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to Ray for the time of the block: to the cluster at `address` (or RAY_ADDRESS), else to a private one.

    Yields whether it is private, and so ends with the block. If this process is connected already, that connection is
    used and left open.

    Raises:
        UserError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    stops = signal.getsignal(signal.SIGTERM)  # Ray sets its own handler
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray listens on every interface of the machine and asks for a token, unless told otherwise: one that only
        # this process and its actors know, in place of a file in the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", TOKEN)
        # Where the memory is full, Ray ends several processes at a time, the run's driver too, unless told otherwise:
        # one at a time, and client actors first.
        os.environ.setdefault("RAY_worker_killing_policy_by_group", "true")
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        try:
            if ":" in address:  # Ray would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
            # Ray does so by itself for "auto" alone, and would try any other address without the token.
            logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--address {address}: no Ray cluster could be joined there ({reason}). Start one with `ray start "
                f"--head`, or leave --address out for a private one. If it is up, its token must be in RAY_AUTH_TOKEN "
                f"or ~/.ray/auth_token here."
            ) from None
    if callable(stops):
        with suppress(ValueError):  # of a thread other than the main one
            signal.signal(signal.SIGTERM, stops)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def send_own_code() -> None:
    """Have Ray send the classes and functions of a user's files whole: other processes cannot import those files."""
    for module in own.loaded():
        ray.cloudpickle.register_pickle_by_value(module)
