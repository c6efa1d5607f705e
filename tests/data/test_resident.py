"""Windows on devices: the batches of the host, picked where they are needed."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.mixed import Mixed
from saex.data.stream import Stream
from tests.data.test_stream import mesh_of

ROWS, D = 700, 6
CONFIG = Stream(batch=32, window=8, lanes=4, exclude_positions=(0,), exclude_tokens=(3,))


def write(path, columns=None):
    n = np.arange(ROWS)
    x = np.sin(n[:, None] * np.arange(1, D + 1)).astype(np.float32)
    columns = columns or {"x": Column((D,)), "y": Column((D,))}
    numbers = dict.fromkeys(("row", "position", "tokens"), Column((), "int32"))
    with StoreWriter(path, {**columns, **numbers}, chunk_rows=16) as writer:
        vectors = {name: x * (i + 1) for i, name in enumerate(columns)}
        writer.append({**vectors, "row": n, "position": n % 9, "tokens": n % 7})
        writer.finish()
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"))


COLUMNS = {"x": "x", "joined": "x+y", "row": "row"}


def opened(store, on_device, config=CONFIG, columns=COLUMNS, **kwargs):
    return dataclasses.replace(config, on_device=on_device).open(store, columns, 3, **kwargs)


def equal(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes()


@pytest.mark.parametrize(("shape", "lanes"), [(None, 4), ((4, 1), 1), ((8, 1), 16), ((2, 2), 4)])
def test_batches_are_those_of_the_host(store, shape, lanes):
    mesh = mesh_of(*shape) if shape else None
    config = dataclasses.replace(CONFIG, lanes=lanes)
    host, device = (opened(store, on, config, mesh=mesh) for on in (False, True))
    last = int(host.steps_per_epoch)
    for step in (*range(6), last - 1, last, last + 1, 3 * last):
        expected, got = host.batch_at(step), device.batch_at(step)
        equal(got, expected)
        assert all(got[n].sharding == expected[n].sharding for n in got)
    equal(device.sample(100), host.sample(100))
    host.close()
    device.close()


def test_each_row_once_and_batches_go_on_from_any_step(store):
    mesh = mesh_of(2, 2)
    config = dataclasses.replace(CONFIG, lanes=1)
    whole = []
    for start in (0, 3, 9):
        stream = opened(store, True, config, mesh=mesh)
        with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
            iterator = stream.iterate(start)
            batches = [next(iterator) for _ in range(10)]
        iterator.close()
        whole = whole or batches
        for got, expected in zip(batches, whole[start:]):
            equal(got, expected)
        stream.close()
    rows = np.concatenate([np.asarray(batch["row"]) for batch in whole])
    assert len(set(rows.tolist())) == len(rows)


def test_another_dtype_is_cast_where_the_rows_are(store):
    got = opened(store, True, dtype="float32").batch_at(2)
    expected = opened(store, False, dtype="float32").batch_at(2)
    equal(got, expected)
    assert opened(store, True).batch_at(2)["x"].dtype == ml_dtypes.bfloat16


def test_windows_come_once_and_two_of_a_lane_are_held(store, monkeypatch):
    reads = []
    original = Store.read_ranges

    def counted(self, name, ranges, *rest):
        reads.append((name, tuple(ranges)))
        return original(self, name, ranges, *rest)

    # Windows of so many chunks that no two are alike, those read ahead of the next epoch included.
    stream = opened(store, True, dataclasses.replace(CONFIG, window=16), columns=["row"])
    monkeypatch.setattr(Store, "read_ranges", counted)
    steps = int(stream.steps_per_epoch) - 1
    for step in range(steps):
        stream.batch_at(step)
        held = [len(w._slots) for windows in stream._resident._lanes._windows for w in windows]
        assert max(held) <= 2
    ours = [ranges for name, ranges in reads if name == "row"]
    assert len(set(ours)) == len(ours)
    stream.close()


def test_what_is_not_kept_on_devices_is_refused(store, tmp_path, monkeypatch):
    scaled = Column((D,), "int8", scales=(0.5,) * D)
    quantised = write(tmp_path / "int8", {"x": scaled})
    with pytest.raises(StoreError, match=r"stream.on_device with the int8 columns \['x'\]"):
        opened(quantised, True, columns=["x"])
    both = Mixed([store, store], [1.0, 1.0], tmp_path / "mix.json")
    with pytest.raises(StoreError, match=r"stream.on_device with several stores"):
        opened(both, True, columns=["x"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(StoreError, match=r"stream.on_device with several processes"):
        opened(store, True, columns=["x"])
