"""The stream: the right rows in the right order on the right devices, from any step."""

import dataclasses
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import saex.data.stream as stream
from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.exclude import resolve
from saex.data.order import Epochs, Order
from saex.data.stream import Stream
from saex.data.windows import Windows

D = 12
CONTEXT = 10
ROWS = 1003


def mesh_of(data, model=1):
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Explicit,) * 2,
        devices=jax.devices()[: data * model],
    )


def write(path, rows=ROWS, finish=True, text=True):
    """Row r holds r in its first two elements (bfloat16 is exact up to 256)."""
    n = np.arange(rows)
    x = np.zeros((rows, D), np.float32)
    x[:, 0], x[:, 1], x[:, 2:] = n % 256, n // 256, np.sin(n[:, None] * np.arange(2, D))
    columns = {"site": Column((D,)), "row": Column((), "int32")}
    values = {"site": x, "row": n}
    if text:
        columns |= {"position": Column((), "int32"), "tokens": Column((), "int32")}
        values |= {"position": n % CONTEXT, "tokens": n % 7}
    with StoreWriter(path, columns, chunk_rows=16) as writer:
        for start in range(0, rows, 200):
            writer.append({k: v[start : start + 200] for k, v in values.items()})
            writer.commit({"next": start + 200})
        if finish:
            writer.finish()
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("store"))


COLUMNS = {"x": "site", "row": "row"}
PLAIN = Stream(batch=64, window=5, exclude_positions=(), lanes=1)


@pytest.fixture
def opened():
    """Opens streams and closes them after the test."""
    streams = []

    def open_stream(config, store, columns=COLUMNS, seed=0, **kwargs):
        streams.append(config.open(store, columns, seed, **kwargs))
        return streams[-1]

    yield open_stream
    for batches in streams:
        batches.close()


def row_numbers(x):
    return (np.asarray(x[:, 0]).astype(int) + 256 * np.asarray(x[:, 1]).astype(int)).tolist()


def test_each_row_exactly_once_per_epoch_and_columns_stay_aligned(store, opened):
    batches = opened(PLAIN, store)
    rows = [batches.gather(e * ROWS, (e + 1) * ROWS) for e in range(3)]
    x = store.read("site")
    for epoch in rows:
        assert sorted(epoch["row"].tolist()) == list(range(ROWS))
        assert epoch["row"].tolist() == row_numbers(epoch["x"])
        assert (epoch["x"] == x[epoch["row"]]).all()
    assert rows[0]["row"].tolist() != rows[1]["row"].tolist()
    assert batches.rows == ROWS and batches.steps_per_epoch == ROWS / 64


def test_leftover_rows_open_the_next_epochs_first_batch(store, opened):
    batches = opened(PLAIN, store)
    steps = [np.asarray(batches.batch_at(i)["row"]).tolist() for i in range(32)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:ROWS]) == list(range(ROWS))
    assert sorted(flat[ROWS : 2 * ROWS]) == list(range(ROWS))
    assert flat == batches.gather(0, 32 * 64)["row"].tolist()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_iterating_from_any_step_equals_the_unbroken_run(store, opened, threads):
    config = Stream(batch=64, window=5, exclude_positions=(0, 3), threads=threads)
    unbroken = opened(config, store).iterate()
    whole = [next(unbroken) for _ in range(60)]
    for start in (0, 1, 17, 41):
        resumed = opened(config, store).iterate(start)
        for expected in whole[start : start + 6]:
            batch = next(resumed)
            assert set(batch) == {"x", "row"}
            for name in batch:
                assert batch[name].dtype == expected[name].dtype
                assert np.asarray(batch[name]).tobytes() == np.asarray(expected[name]).tobytes()
        resumed.close()


def test_order_depends_on_the_seed_alone(store, opened):
    first, again, other = (
        opened(PLAIN, store, seed=s).gather(0, 300)["row"].tolist() for s in (5, 5, 6)
    )
    assert first == again != other
    # what else is read makes no difference
    assert opened(PLAIN, store, columns=["row"], seed=5).gather(0, 300)["row"].tolist() == first


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 4), (4, 2), (1, 8)])
def test_the_same_global_batch_on_every_mesh(store, opened, shape):
    plain, mesh = opened(PLAIN, store), mesh_of(*shape)
    sharded = opened(PLAIN, store, mesh=mesh)
    for step in (0, 15, 16):
        batch, expected = sharded.batch_at(step), plain.batch_at(step)
        for name in batch:
            assert batch[name].sharding == jax.NamedSharding(mesh, jax.P("data"))
            assert (np.asarray(batch[name]) == np.asarray(expected[name])).all()
        shards = {s.device.id: s.data.shape[0] for s in batch["x"].addressable_shards}
        assert set(shards.values()) == {64 // shape[0]} and len(shards) == shape[0] * shape[1]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_together_read_each_row_once_in_the_same_order(store, opened, processes):
    """Process p holds rows [p * b / P, (p + 1) * b / P) of every global batch."""
    whole, share = opened(PLAIN, store), 64 // processes
    parts = [opened(PLAIN, store) for _ in range(processes)]
    for step in (0, 7, 15, 31):
        rows = [
            part.gather(step * 64 + p * share, step * 64 + (p + 1) * share)["row"]
            for p, part in enumerate(parts)
        ]
        assert np.concatenate(rows).tolist() == np.asarray(whole.batch_at(step)["row"]).tolist()


def test_a_jitted_step_takes_the_batch_under_the_mesh(store, opened):
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        batches = opened(PLAIN, store, mesh=mesh)
        iterator = batches.iterate()
        total = jax.jit(lambda batch: batch["row"].sum())(next(iterator))
        iterator.close()
    assert int(total) == batches.gather(0, 64)["row"].sum()


def test_exclusions_are_exact_and_counted(store, opened):
    config = Stream(batch=64, window=5, lanes=1, exclude_positions=(0, 9), exclude_tokens=(3,))
    batches = opened(config, store, columns=["row"])
    n = np.arange(ROWS)
    by_position = np.isin(n % CONTEXT, (0, 9))
    kept = n[~by_position & (n % 7 != 3)]
    assert sorted(batches.gather(0, len(kept))["row"].tolist()) == kept.tolist()
    assert sorted(batches.gather(len(kept), 2 * len(kept))["row"].tolist()) == kept.tolist()
    info = batches.info
    assert info["rows"] == ROWS and info["rows_kept"] == batches.rows == len(kept)
    assert info["rows_excluded_by_position"] == by_position.sum()
    assert info["rows_excluded_by_tokens"] == ROWS - by_position.sum() - len(kept)


def test_rows_are_left_out_by_any_column_of_numbers(store, opened):
    rules = {"row": (5, 900), "tokens": (2,)}
    config = Stream(batch=64, lanes=1, exclude_positions=(), exclude=rules)
    batches = opened(config, store, columns=["row"])
    n = np.arange(ROWS)
    kept = n[~np.isin(n, (5, 900)) & (n % 7 != 2)]
    assert sorted(batches.gather(0, len(kept))["row"].tolist()) == kept.tolist()
    assert batches.info["rows_excluded_by_row"] + batches.info["rows_excluded_by_tokens"] == (
        ROWS - len(kept)
    )
    both = Stream(batch=64, exclude_tokens=(3,), exclude={"tokens": (2,)}, exclude_positions=())
    assert opened(both, store).rows == (~np.isin(n % 7, (2, 3))).sum()
    for rule, match in (
        ({"label": (1,)}, r"no column 'label': leave 'label' out of stream.exclude"),
        ({"row": ("a",)}, r"by row \['a'\], but column 'row' .* rules name whole numbers"),
        ({"site": (1,)}, r"shape \(12,\) and dtype bfloat16"),
    ):
        with pytest.raises(StoreError, match=match):
            opened(Stream(batch=64, exclude=rule), store)


def test_what_the_rules_leave_in_is_remembered_by_their_hash(store, opened, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(stream, "resolve", lambda *a, **k: made.append(k) or resolve(*a, **k))
    config = Stream(batch=64, exclude_tokens=(3,), exclude={"row": (5,)})

    def rows(config, source=store):
        batches = opened(config, source, columns=["row"], cache=tmp_path / "rows")
        return batches.gather(0, 320)["row"].tolist(), batches.info

    first = rows(config)
    files = list((tmp_path / "rows").iterdir())
    assert len(made) == len(files) == 1 and files[0].suffix == ".npz"
    assert rows(config) == first and len(made) == 1
    assert (
        rows(dataclasses.replace(config, batch=32, threads=0))[1]["rows_kept"]
        == (first[1]["rows_kept"])
    )
    assert len(made) == 1  # how they become batches is no rule
    for i, other in enumerate(({"exclude_tokens": (4,)}, {"exclude": {"row": (6,)}}), 2):
        assert rows(dataclasses.replace(config, **other)) != first and len(made) == i
    assert rows(config, write(tmp_path / "other", 900))[1]["rows"] == 900 and len(made) == 4
    data = files[0].read_bytes()
    for torn in (b"", data[: len(data) // 2], data.replace(b"rows_kept", b"rows_kepu")):
        files[0].write_bytes(torn)
        made.clear()
        assert rows(config) == first and len(made) == 1
    assert files[0].read_bytes() != torn
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    (tmp_path / "rows").rmdir()
    (tmp_path / "rows").write_text("a file where the folder should be")
    assert rows(config) == first


def test_position_0_is_left_out_by_default(store, opened, tmp_path):
    assert (opened(Stream(batch=64), store).gather(0, 800)["row"] % CONTEXT > 0).all()
    rows = write(tmp_path, rows=100, text=False)  # not text: nothing to leave out
    assert opened(Stream(batch=64), rows).rows == 100
    for field, value in (("exclude_positions", (1,)), ("exclude_tokens", (0,))):
        with pytest.raises(StoreError, match=f"set stream.{field}="):
            opened(Stream(batch=64, **{field: value}), rows)


def test_norm_outliers_are_left_out_by_a_rule_and_counted(opened, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 8)) * np.where(np.arange(300) % 10 == 3, 40, 1)[:, None]
    norms = np.linalg.norm(x, axis=1)
    columns = {
        "x": Column((8,), "float32"),
        "x.norm": Column((), "float32"),
        "n": Column((), "int32"),
    }
    with StoreWriter(tmp_path, columns, chunk_rows=16) as writer:
        writer.append({"x": x, "x.norm": norms, "n": np.arange(300)})
        writer.finish()
    batches = opened(
        Stream(batch=16, lanes=1, max_norm=6.0), Store.open(tmp_path), columns=["x", "n"]
    )
    kept = np.flatnonzero(norms <= np.float32(6 * np.median(norms.astype(np.float32))))
    assert 200 < len(kept) < 280
    assert sorted(batches.gather(0, batches.rows)["n"].tolist()) == kept.tolist()
    assert batches.info["rows_excluded_by_x.norm"] == 300 - len(kept)
    assert batches.info["max_x.norm"] == pytest.approx(6 * np.median(norms), rel=1e-5)
    with pytest.raises(StoreError, match=r"no column 'site.norm': harvest with harvest.norms=True"):
        opened(Stream(batch=16, max_norm=6.0), write(tmp_path / "plain", 100), columns=["site"])
    with pytest.raises(ValueError, match=r"stream.max_norm=-1"):
        Stream(max_norm=-1.0)


def test_batches_handed_out_never_change(store, opened):
    """jax.Array may lie in the memory of the numpy array it was made of, and window buffers are
    used again: keep every batch of two epochs and compare at the end."""
    batches = opened(Stream(batch=64, window=2, exclude_positions=()), store)
    iterator = batches.iterate()
    held = [next(iterator) for _ in range(2 * ROWS // 64)]
    copies = [{n: np.array(v, copy=True) for n, v in b.items()} for b in held]
    for _ in range(2 * ROWS // 64):
        next(iterator)
    iterator.close()
    batches.close()
    gc.collect()
    fresh = opened(Stream(batch=64, window=2, exclude_positions=()), store)
    for step, (batch, copy) in enumerate(zip(held, copies)):
        expected = fresh.gather(step * 64, (step + 1) * 64)
        for name in batch:
            assert np.asarray(batch[name]).tobytes() == copy[name].tobytes()
            assert copy[name].tobytes() == expected[name].tobytes()


def test_bfloat16_stays_unless_another_dtype_is_asked_for(store, opened):
    stored = opened(PLAIN, store).batch_at(3)
    asked = opened(PLAIN, store, dtype="float32").batch_at(3)
    assert stored["x"].dtype == ml_dtypes.bfloat16 and asked["x"].dtype == np.float32
    assert (np.asarray(stored["x"]).astype(np.float32) == np.asarray(asked["x"])).all()
    assert asked["row"].dtype == np.int32


def test_one_column_may_have_two_names(store, opened):
    batch = opened(PLAIN, store, columns={"x": "site", "y": "site"}).batch_at(0)
    assert (np.asarray(batch["x"]) == np.asarray(batch["y"])).all()


def test_sample_is_the_beginning_and_at_most_an_epoch(store, opened):
    batches = opened(PLAIN, store)
    assert batches.sample(10)["row"].tolist() == batches.gather(0, 10)["row"].tolist()
    assert sorted(batches.sample(10**6)["row"].tolist()) == list(range(ROWS))


def test_info_says_what_it_takes(store, opened):
    info = opened(PLAIN, store).info
    assert info["windows_per_epoch"] == 14  # 5 segments of 13 chunks and one of 1, by 5
    assert info["window_rows"] == 5 * 16
    assert info["window_bytes"] == 5 * 16 * (2 * D + 4)


def test_rows_reads_in_order_and_leaves_nothing_out(store):
    parts = list(stream.rows(store, {"x": "site", "n": "row"}, 5, 100, batch=40))
    assert [len(p["n"]) for p in parts] == [40, 40, 15]
    assert np.concatenate([p["n"] for p in parts]).tolist() == list(range(5, 100))
    assert row_numbers(parts[1]["x"]) == list(range(45, 85))
    assert sum(len(p["row"]) for p in stream.rows(store, ["row"])) == ROWS


def test_bad_input_is_named(store, opened, tmp_path):
    with pytest.raises(StoreError, match=r"no column 'blocks.1'; it has site \[12\] bfloat16"):
        opened(PLAIN, store, columns={"x": "blocks.1"})
    with pytest.raises(StoreError, match="fewer than one batch of 2048"):
        opened(Stream(batch=2048), store)
    with pytest.raises(StoreError, match="0 of which are kept"):
        opened(Stream(batch=8, exclude_tokens=tuple(range(7))), store)
    with pytest.raises(ValueError, match=r"stream.batch=60 cannot be split over mesh.data=8.*64"):
        opened(Stream(batch=60, lanes=4), store, mesh=mesh_of(8))
    with pytest.raises(ValueError, match="needs 'data'"):
        opened(PLAIN, store, mesh=jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    with pytest.raises(ValueError, match="seed=-1"):
        opened(PLAIN, store, seed=-1)
    with pytest.raises(StoreError, match=r"not complete .*Run the same harvest again"):
        opened(PLAIN, write(tmp_path, finish=False))
    with pytest.raises(ValueError, match=r"stream.batch=12 is not a multiple of stream.lanes=8"):
        Stream(batch=12)
    with pytest.raises(ValueError, match=r"stream.window=-1"):
        Stream(window=-1)
    for field in ("batch", "lanes", "prefetch"):
        with pytest.raises(ValueError, match=f"stream.{field}=0"):
            Stream(**{field: 0})


@pytest.mark.parametrize("threads", [0, 2])
def test_a_shard_altered_under_a_running_job_stops_it_by_name(opened, tmp_path, threads):
    store = write(tmp_path, rows=400)
    config = Stream(batch=16, window=1, exclude_positions=(), threads=threads)
    iterator = opened(config, store).iterate()
    next(iterator)
    shards = list(tmp_path.glob("segment-*/site/c/0/0"))
    for shard in shards:
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(StoreError, match="run the same harvest again") as error:
        for _ in range(400 // 16):
            next(iterator)
    assert any(str(shard) in str(error.value) for shard in shards)
    iterator.close()


def test_checksums_on_request_find_what_the_file_system_does_not_tell(opened, tmp_path):
    store = write(tmp_path, rows=400)
    shard = tmp_path / store.manifest.segments[0].path / "site/c/0/0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    again = Store.open(tmp_path)  # size and index are as they were
    whole = opened(Stream(batch=16, exclude_positions=()), again).gather(0, 400)
    assert (whole["x"] == again.read("site")[whole["row"]]).all()  # as it lies there
    checked = opened(Stream(batch=16, exclude_positions=(), checksums=True), again)
    with pytest.raises(StoreError, match="hurt: rows"):
        checked.gather(0, 400)


def test_threads_that_jump_about_do_not_disturb_each_other(store, opened):
    config = Stream(batch=64, window=1, exclude_positions=())
    steps = np.random.default_rng(0).integers(0, 30, (4, 12)).tolist()
    quiet, busy = opened(config, store), opened(config, store)
    expected = {s: quiet.gather(s * 64, s * 64 + 64)["row"].tolist() for s in range(30)}

    def visit(own):
        return [busy.gather(s * 64, s * 64 + 64)["row"].tolist() == expected[s] for s in own]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(ok) for ok in pool.map(visit, steps))


def test_a_window_in_use_keeps_its_buffers(store):
    kept = resolve(store, (), ())
    reader = ThreadPoolExecutor(1)
    windows = Windows(store, ["row"], Order(Epochs(kept.counts, 0), window=5), kept, reader)
    with windows.borrow(0, 0) as held:
        before = held.buffers["row"].copy()
        for other in (3, 5, 7, 9, 11):
            with windows.borrow(0, other) as window:
                assert not (window.buffers["row"] == before).all()
        assert (held.buffers["row"] == before).all()
    reader.shutdown()
    windows.close()


def test_windows_are_read_ahead_and_buffers_used_again(store, opened, monkeypatch):
    reads = []
    original = Store.read_ranges

    def counted(self, name, ranges, out, checksums):
        reads.append(out.__array_interface__["data"][0])
        return original(self, name, ranges, out, checksums)

    batches = opened(PLAIN, store, columns=["row"])
    monkeypatch.setattr(Store, "read_ranges", counted)
    batches.batch_at(0)
    deadline = time.monotonic() + 20
    while len(reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reads) == 2, "the next window was not read ahead"
    for step in range(2 * ROWS // 64):
        batches.batch_at(step)
    windows = 2 * batches.info["windows_per_epoch"]
    assert windows - 1 <= len(reads) <= windows + 2  # each window once, and one or two ahead
    assert len(set(reads)) <= 3
