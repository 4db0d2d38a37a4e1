"""A connection to Ray: to a running cluster, or to a private one that ends with this process."""

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

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
        # What its processes free, they keep (`memory.py`); glibc does so for one arena, which threads then share.
        os.environ.setdefault("MALLOC_ARENA_MAX", "1")
        ray.init(address="local", include_dashboard=False, **quiet)
    else:
        try:
            # Ray does so by itself for "auto" alone, and would try any other address without the token.
            logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            ray.init(address=_checked(address), **quiet)
        except AuthenticationError:
            raise UserError(
                f"--address {address}: the cluster refuses the token of this process, or it has none. Set "
                f"RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token or in RAY_AUTH_TOKEN."
            ) from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"--address {address}: no Ray cluster could be joined there ({reason}). Start one with "
                f"`ray start --head`, or leave --address out for a private one."
            ) from None
    if callable(stops):
        with suppress(ValueError):  # of a thread other than the main one
            signal.signal(signal.SIGTERM, stops)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def _checked(address: str) -> str:
    """Return HOST:PORT of the cluster at an address, which answers and accepts this process's token.

    `ray.init` would try for minutes.

    Raises:
        AuthenticationError: it does not accept the token, or there is none.
        OSError: it does not answer.
    """
    there = canonicalize_bootstrap_address(address)
    if there is None:
        raise OSError("no cluster was started on this machine")
    with init_grpc_channel(there) as channel:
        heads = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            heads.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_TIMEOUT)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(error.details()) from None
            raise OSError(f"{there} does not answer: {error.details()}") from None
    return there


def send_own_code() -> None:
    """Have Ray send the classes and functions of a user's files whole: other processes cannot import those files."""
    for module in own.loaded():
        ray.cloudpickle.register_pickle_by_value(module)
