"""Stores on an S3 server that the test starts on loopback; needs `pip install moto[server]`."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.store_copy import copy_store
from saex.data.store_remote import RemotePath, is_remote
from saex.data.stream import Stream

needs_server = pytest.mark.skipif(
    importlib.util.find_spec("moto") is None, reason="needs an S3 server: pip install 'saex[s3]'"
)
COLUMNS = {"x": Column((5,)), "n": Column((), "int32")}


def write(path, rows=300):
    with StoreWriter(path, COLUMNS, {"made": "here"}, chunk_rows=16) as writer:
        for part in (slice(0, 100), slice(100, rows)):
            n = np.arange(rows)[part]
            writer.append({"n": n, "x": np.sin(n[:, None] * np.arange(1, 6))})
            writer.commit({})
        writer.finish()
    return Store.open(path)


@pytest.fixture
def bucket(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(f"{url}/bucket")
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def _make_bucket(url):
    for _ in range(240):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"))
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the S3 server did not start")


@needs_server
def test_a_store_on_s3_is_the_store_it_was_copied_from(bucket, tmp_path):
    local = write(tmp_path / "local")
    remote = copy_store(local.path, f"{bucket}/stores/one")
    assert remote.digest == local.digest and remote.rows == 300
    for name in COLUMNS:
        assert remote.read(name).tobytes() == local.read(name).tobytes()
        assert remote.read(name, 95, 131).tobytes() == local.read(name, 95, 131).tobytes()
    remote.verify()
    streams = [Stream(batch=32).open(s, ["n"], 0) for s in (local, remote)]
    batches = [stream.gather(0, 320)["n"].tolist() for stream in streams]
    assert batches[0] == batches[1]
    [stream.close() for stream in streams]
    assert copy_store(f"{bucket}/stores/one", tmp_path / "back").digest == local.digest
    with pytest.raises(StoreError, match="is a store already"):
        copy_store(local.path, f"{bucket}/stores/one")
    # Damage: a flipped byte of a payload, then a shard that is cut short.
    shard = RemotePath(f"{bucket}/stores/one/{local.manifest.segments[1].path}/x/c/0/0")
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(bytes(data))
    again = Store.open(remote.path)
    with pytest.raises(StoreError, match=r"does not match its checksum .* rows 100 to 115"):
        again.verify()
    shard.write_bytes(bytes(data[:-7]))
    with pytest.raises(StoreError, match=local.manifest.segments[1].path):
        Store.open(remote.path)
    with pytest.raises(StoreError, match=r"has no manifest.json"):
        Store.open(f"{bucket}/nothing")


def test_a_server_that_does_not_answer_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StoreError, match=r"s3://bucket/one/manifest.json cannot be read"):
        Store.open("s3://bucket/one")


def test_copies_of_folders(tmp_path):
    local = write(tmp_path / "a")
    assert copy_store(tmp_path / "a", tmp_path / "b").digest == local.digest
    file = tmp_path / "a" / local.manifest.segments[0].path / "n/c/0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="hurt: rows 0 to 15"):
        copy_store(tmp_path / "a", tmp_path / "c")
    with pytest.raises(StoreError, match=r"has no manifest.json"):
        Store.open(tmp_path / "c")


def test_names_of_object_stores():
    assert is_remote("s3://b/x") and is_remote("gs://b/x") and not is_remote("/tmp/x")
    assert (RemotePath("s3://b/x/") / "y").url == "s3://b/x/y"
    spec = RemotePath("gs://b/x/y").kvstore()
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "b", "x/y/")
