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
join = '''
import sys
from fedray.cluster.connection import connected
from fedray.errors import UserError
try:
    with connected(sys.argv[1]):
        print("joined")
except UserError as error:
    print(error)
'''
with connected(None):
    address = ray.get_runtime_context().gcs_address
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    right, wrong = ({"RAY_AUTH_TOKEN": token} for token in (os.environ["RAY_AUTH_TOKEN"], "a" * 64))
    given = [right, wrong, {"RAY_AUTH_MODE": "disabled"}]
    ran = [subprocess.Popen([sys.executable, "-c", join, address], env=env | token, stdout=subprocess.PIPE, text=True)
           for token in given]
    for each in ran:
        print(each.communicate(timeout=200)[0].strip())
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    with_it, wrong, without = ran.stdout.splitlines()
    assert with_it == "joined", ran.stderr
    for said in (wrong, without):
        assert "the cluster refuses the token of this process, or it has none" in said
        assert said.endswith("have the cluster's token in ~/.ray/auth_token or in RAY_AUTH_TOKEN.")


def test_no_cluster_at_the_address(monkeypatch):
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    started = time.monotonic()
    for address in ("127.0.0.1:1", "nowhere", "host:port"):
        with pytest.raises(UserError, match=f"--address {address}: no Ray cluster"), connection.connected(address):
            pass
    assert time.monotonic() - started < 30
