"""Joining Ray: who may, and what is said where there is none."""

import os
import subprocess
import sys
import time

import pytest

from fedray.cluster import connection
from fedray.errors import UserError


@pytest.mark.slow
def test_a_private_ray_asks_for_a_token():
    """Ray listens on every interface: nobody without the token may join, nor may one that says it needs none."""
    code = """
import os, subprocess, sys
import ray
from fedray.cluster.connection import connected
with connected(None):
    address = ray.get_runtime_context().gcs_address
    join = "import ray; ray.init(address=sys.argv[1], log_to_driver=False); print('joined', ray.cluster_resources())"
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for token in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        ran = subprocess.run([sys.executable, "-c", "import sys; " + join, address], env=env | token,
                             capture_output=True, text=True, timeout=100)
        print(ran.returncode != 0, "joined" in ran.stdout)
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines() == ["True False"] * 2, ran.stdout + ran.stderr


def test_no_cluster_at_the_address(monkeypatch):
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    started = time.monotonic()
    for address in ("127.0.0.1:1", "nowhere", "host:port"):
        with pytest.raises(UserError, match=f"--address {address}: no Ray cluster"), connection.connected(address):
            pass
    assert time.monotonic() - started < 30
