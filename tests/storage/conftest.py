from uuid import uuid4

import fsspec
import pytest
import s3


@pytest.fixture(scope="session")
def proxy():
    with s3.server() as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy, monkeypatch, node):
    """A bucket of an S3 server: its URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    proxy.fault = lambda method, path: None
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    proxy.seen.clear()
    return f"s3://{name}"


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Be on a node of that name: one with a cache of its own."""

    def be_on(name):
        monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / name))

    be_on("first node")
    return be_on


@pytest.fixture(params=["s3", "memory", "plain"])
def place(request):
    """The URL of a folder of a storage of each kind: with conditional writes over HTTP, in memory, and without."""
    if request.param == "s3":
        return request.getfixturevalue("bucket") + "/runs"
    request.getfixturevalue("node")
    fsspec.get_filesystem_class(request.param).store.clear()
    return f"{request.param}://runs"
