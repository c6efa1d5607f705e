"""Raw reads: the same bytes as through tensorstore, whatever the ranges; changed files refused."""

import os
import threading

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter, raw


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    columns = {"x": Column((3, 5)), "n": Column((), "int32"), "q": Column((7,), "int8")}
    with StoreWriter(path, columns, chunk_rows=16) as writer:
        for rows in (100, 1, 16, 333):
            writer.append(
                {
                    "x": rng.standard_normal((rows, 3, 5)),
                    "n": rng.integers(0, 1000, rows),
                    "q": rng.integers(-128, 128, (rows, 7)),
                }
            )
            writer.commit({})
        writer.finish()
    return Store.open(path)


@pytest.mark.parametrize("small", [raw._SMALL, 0])
@pytest.mark.parametrize("name", ["x", "n", "q"])
def test_equals_the_checked_path_on_random_ranges(store, name, small, monkeypatch):
    """Of chunks that are read together, and of those that have a buffer each."""
    monkeypatch.setattr(raw, "_SMALL", small)
    monkeypatch.setattr(raw, "_JOB_BYTES", 2000)  # several jobs a range
    rng = np.random.default_rng(1)
    for _ in range(60):
        ranges = [tuple(sorted(rng.integers(0, store.rows + 1, 2).tolist())) for _ in range(4)]
        rows, column = sum(b - a for a, b in ranges), store.columns[name]
        outs = [np.empty((rows, *column.shape), column.numpy_dtype) for _ in range(2)]
        for out, checksums in zip(outs, (False, True)):
            assert store.read_ranges(name, ranges, out, checksums) == rows
        assert outs[0].tobytes() == outs[1].tobytes()


def test_chunks_may_lie_in_any_order(store, tmp_path):
    """The format promises no order: a shard with its chunks turned round, and its index with it."""
    job = raw.Job(store._shard(3, "n"), 0, 333, np.empty(333, np.int32))
    assert raw.run([job]) == [None]
    data, size = job.shard.file.read_bytes(), 16 * 4 + 4  # a chunk and its CRC
    chunks = [data[o : o + size] for o in job.shard.offsets]
    file = tmp_path / "turned"
    file.write_bytes(b"".join(reversed(chunks)))
    offsets = np.arange(len(chunks))[::-1] * size
    turned = raw.Shard(file, offsets, 16, 4, raw.stamp(os.stat(file)))
    for start in (0, 5):
        out = np.empty(333 - start, np.int32)
        assert raw.run([raw.Job(turned, start, 333, out)]) == [None]
        assert (out == job.out[start:]).all()


def test_reads_that_stop_early_go_on(store, monkeypatch):
    expected, preadv = store.read("x"), os.preadv

    def short(fd, views, offset, flags):
        return preadv(fd, [views[0][: max(1, len(views[0]) // 3)]], offset, flags)

    monkeypatch.setattr(raw.os, "preadv", short)
    assert (store.read("x") == expected).all()


@pytest.mark.parametrize("there", [0, 1, 5, 100])
def test_what_is_not_in_memory_is_read_by_other_threads(store, monkeypatch, there):
    """The first `there` reads find their bytes in memory, the next ones do not."""
    monkeypatch.setattr(raw, "_JOB_BYTES", 2000)
    monkeypatch.setattr(raw, "_NO_WAIT", 8)
    expected, preadv, asked, waited = store.read("x"), os.preadv, [], []

    def cold(fd, views, offset, flags):
        if flags:
            asked.append(offset)
            if len(asked) > there:
                raise BlockingIOError
        else:
            waited.append(threading.current_thread().name)
        return preadv(fd, views, offset)

    monkeypatch.setattr(raw.os, "preadv", cold)
    assert (store.read("x", 101, 450) == expected[101:450]).all()
    assert len(asked) <= there + 1
    assert bool(waited) == (there < 100)
    assert all(name.startswith("saex-read") for name in waited)


def test_a_file_that_ends_while_it_is_read_is_named(store, monkeypatch):
    monkeypatch.setattr(raw.os, "preadv", lambda *_: 0)
    with pytest.raises(StoreError, match=r"n/c/0: ends early .*; hurt: rows 101 to 115"):
        store.read("n", 101, 116)
