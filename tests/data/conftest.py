"""Stores under test lie in memory where that can be: a commit waits for the disk many times."""

import itertools
import os
import pathlib
import tempfile

import pytest

from tests.data import servers

_NUMBERS = itertools.count()


@pytest.fixture
def tmp_path(tmp_path):
    shm = pathlib.Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm, prefix="saex-test-") as folder:
        yield pathlib.Path(folder)


@pytest.fixture(scope="session")
def server_ports():
    """scheme -> port of a server that runs, started when it is first asked for."""
    running, ports = [], {}

    def port(scheme):
        if scheme not in ports:
            ports[scheme] = servers.free_port()
            running.append(servers.start(scheme, ports[scheme]))
        return ports[scheme]

    yield port
    for server in running:
        server.kill()
        server.wait()


@pytest.fixture
def scheme():
    """Of the object store; a test that is for others too has it as a parameter."""
    return "s3"


@pytest.fixture
def way(scheme, server_ports):
    """The way to a server, on which requests can fail."""
    way = servers.Way(server_ports(scheme))
    yield way
    way.close()


@pytest.fixture
def bucket(scheme, way, monkeypatch, tmp_path):
    """The name of an empty bucket, with all that a process needs in its environment to reach it."""
    settings = {
        "s3": {
            "AWS_ENDPOINT_URL": way.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        },
        "gs": {"TENSORSTORE_GCS_HTTP_URL": way.url},
    }[scheme]  # fmt: skip
    (tmp_path / "spool").mkdir()
    for name, value in {**settings, "TMPDIR": str(tmp_path / "spool")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    name = f"bucket-{next(_NUMBERS)}"
    servers.make_bucket(scheme, f"http://127.0.0.1:{way.port}", name)
    return f"{scheme}://{name}"
