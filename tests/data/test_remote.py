"""Stores on object stores, read and copied; against servers of `saex[servers]` where it says so."""

import collections
import http.server
import json
import re
import threading
import time

import numpy as np
import pytest

from saex import loop
from saex.data import Column, Store, StoreError, StoreWriter, calibrate, store_remote
from saex.data.split import open_split
from saex.data.store_copy import copy_store
from saex.data.store_remote import RemotePath, is_remote
from saex.data.stream import Stream
from tests import runs
from tests.data.servers import EVERY_SCHEME, needs

QUANTISED = calibrate(np.sin(np.arange(400.0)[:, None] * np.arange(1, 6)), 0.0, max_outliers=1)
COLUMNS = {"x": Column((5,)), "n": Column((), "int32"), "q": QUANTISED}
COLUMNS |= {"label": Column((), "string")}


def write(path, rows=300):
    with StoreWriter(path, COLUMNS, {"made": "here"}, chunk_rows=16) as writer:
        for part in (slice(0, 100), slice(100, rows)):
            n = np.arange(rows)[part]
            x = np.sin(n[:, None] * np.arange(1, 6))
            writer.append({"n": n, "x": x, "q": x, "label": [f"{i % 3} ü" for i in n]})
            writer.commit({})
        writer.finish()
    return Store.open(path)


@EVERY_SCHEME
def test_a_store_on_an_object_store_is_the_store_it_was_copied_from(bucket, tmp_path):
    local = write(tmp_path / "local")
    remote = copy_store(local.path, f"{bucket}/stores/one")
    assert remote.digest == local.digest and remote.rows == 300
    for name in COLUMNS:
        assert remote.read(name).tobytes() == local.read(name).tobytes()
        assert remote.read(name, 95, 131).tobytes() == local.read(name, 95, 131).tobytes()
    remote.verify()
    assert remote.strings("label") == local.strings("label") == ("0 ü", "1 ü", "2 ü")
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


@needs("s3")
def test_a_run_trains_on_a_store_that_lies_on_s3(bucket, tmp_path):
    columns = {"x": Column((16,)), "document": Column((), "int32")}
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path / "local", columns, chunk_rows=512) as writer:
        writer.append({"x": rng.standard_normal((3000, 16)), "document": np.arange(3000) // 10})
        writer.finish()
    copy_store(tmp_path / "local", f"{bucket}/rows")
    changes = {"site": "x", "subject": None, "stream__batch": 64}
    results = []
    for store in (f"{bucket}/rows", str(tmp_path / "local")):
        workdir = tmp_path / f"run{len(results)}"
        results.append(loop.train(runs.config(tmp_path, store=store, **changes), workdir))
        written = json.loads((workdir / "config.json").read_text())
        assert written["config"]["store"] == store
    assert results[0] == results[1] and results[0]["fvu"] > 0
    mix = {"stores": [{"path": f"{bucket}/rows", "weight": 1}, {"path": "local", "weight": 1}]}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    sides = open_split(tmp_path / "mix.json", "train").stores
    assert sides[0].digest == sides[1].digest


class Files(http.server.BaseHTTPRequestHandler):
    """S3 as far as reading goes: objects are files; so many requests for each fail first."""

    root, failures, status, seen = None, 0, 503, collections.Counter()
    times = collections.defaultdict(list)  # of the requests for each

    def do_GET(self):
        self.seen[self.path] += 1
        self.times[self.path].append(time.monotonic())
        file = self.root / self.path.removeprefix("/bucket/")
        if self.seen[self.path] <= self.failures:
            return self._answer(self.status, b"<Error><Code>SlowDown</Code></Error>")
        if not file.is_file():
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first = int(asked[1]) if asked[1] else len(data) - int(asked[2])
            last = int(asked[2]) if asked[1] and asked[2] else len(data) - 1
            span = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], span)
        self._answer(200, data)

    do_HEAD = do_GET

    def _answer(self, status, body, span=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def flaky(monkeypatch, tmp_path):
    """A server of our own whose failures a test decides; pauses between attempts are short."""
    handler = type("Handler", (Files,), {"root": tmp_path, "seen": collections.Counter()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(store_remote, "_RETRIES", RETRIES)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


RETRIES = {"max_retries": 4, "initial_delay": "10ms", "max_delay": "50ms"}


def test_requests_that_fail_are_tried_again(flaky, tmp_path):
    local = write(tmp_path / "one")
    flaky.failures = 2
    store = Store.open("s3://bucket/one")
    assert store.digest == local.digest
    assert store.read("x").tobytes() == local.read("x").tobytes()
    store.verify()
    assert flaky.seen["/bucket/one/manifest.json"] == 3


def test_pauses_between_attempts_grow(flaky, monkeypatch, tmp_path):
    """A server that is overloaded is not asked faster than that."""
    waits = {**store_remote._RETRIES, "initial_delay": "40ms", "max_delay": "10s"}
    monkeypatch.setattr(store_remote, "_RETRIES", waits)
    flaky.failures, flaky.times = 4, collections.defaultdict(list)
    write(tmp_path / "one")
    place = store_remote.place("s3://bucket/one/manifest.json")
    assert place.read_bytes()
    pauses = np.diff(flaky.times["/bucket/one/manifest.json"])
    assert len(pauses) == 4
    assert (pauses > 0.03 * 2.0 ** np.arange(4)).all(), pauses  # a busy machine makes them longer


def test_a_server_that_keeps_failing_is_an_error_after_some_attempts(flaky, tmp_path):
    write(tmp_path / "one")
    flaky.failures = 10**9
    with pytest.raises(StoreError, match=r"s3://bucket/one/manifest.json cannot be read: .*503"):
        Store.open("s3://bucket/one")
    assert flaky.seen["/bucket/one/manifest.json"] == RETRIES["max_retries"] + 1
    flaky.failures = 0
    store = Store.open("s3://bucket/one")
    batches = Stream(batch=32, threads=0).open(store, ["x"], 0)
    batches.batch_at(0)
    flaky.failures = 10**9  # in the middle of a job
    with pytest.raises(StoreError, match=r"one/segment-.*/x/c/0/0: .*503"):
        for step in range(1, 40):
            batches.batch_at(step)
    batches.close()


def test_a_server_that_forbids_is_an_error_that_says_so(flaky, tmp_path):
    write(tmp_path / "one")
    flaky.failures, flaky.status = 10**9, 403
    with pytest.raises(StoreError, match=r"cannot be read: .*403"):
        Store.open("s3://bucket/one")


def test_a_server_that_does_not_answer_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(store_remote, "_RETRIES", RETRIES)
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
    for url in ("s3://b", "s3://b/"):
        assert RemotePath(url).kvstore()["path"] == ""
        assert (RemotePath(url) / "manifest.json").url == "s3://b/manifest.json"


@pytest.mark.parametrize("url", ["s3:///x", "gs://", "s3://b/run#1", "s3://b/run?x=1"])
def test_names_that_mean_another_place_are_refused(url):
    with pytest.raises(StoreError, match=r"is no place on an object store: expected (s3|gs)://b"):
        Store.open(url)
    with pytest.raises(StoreError, match="is no place on an object store"):
        StoreWriter(url, COLUMNS)


@EVERY_SCHEME
def test_a_bucket_may_be_a_store(bucket, tmp_path):
    local = write(tmp_path / "local")
    with StoreWriter(bucket, COLUMNS, {"made": "here"}, chunk_rows=16) as writer:
        n = np.arange(300)
        x = np.sin(n[:, None] * np.arange(1, 6))
        writer.append({"n": n, "x": x, "q": x, "label": [f"{i % 3} ü" for i in n]})
        writer.finish()
    assert {key.split("/")[0][:7] for key in RemotePath(bucket)._keys()} == {
        "manifes", "segment", "writer.",
    }  # fmt: skip
    assert Store.open(bucket).read("x").tobytes() == local.read("x").tobytes()
