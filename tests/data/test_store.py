"""Store and writer: what goes in comes out, exactly, and nothing else goes in."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.statistics import ColumnStats

BF16 = ml_dtypes.bfloat16
COLUMNS = {"x": Column((5,)), "y": Column((2, 3), "float32"), "tokens": Column((), "int32")}


def make_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((n, 5)).astype(BF16),
        "y": rng.standard_normal((n, 2, 3)).astype(np.float32),
        "tokens": rng.integers(0, 1000, n).astype(np.int32),
    }


def write(path, parts, columns=COLUMNS, chunk_rows=8, meta=None):
    with StoreWriter(path, columns, meta or {"made": "here"}, chunk_rows=chunk_rows) as writer:
        for i, rows in enumerate(parts):
            writer.append(rows)
            writer.commit({"next": i + 1})
        writer.finish()
    return Store.open(path)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_over_segments_and_ranges(tmp_path):
    parts = [make_rows(n, seed=n) for n in (19, 8, 1, 30)]
    store = write(tmp_path, parts)
    whole = {n: np.concatenate([p[n] for p in parts]) for n in COLUMNS}
    assert store.rows == 58 and store.complete and store.meta == {"made": "here"}
    for name, values in whole.items():
        assert same(store.read(name), values)
        for start, stop in ((0, 0), (18, 20), (26, 29), (27, 28), (5, 58), (58, 58)):
            assert same(store.read(name, start, stop), values[start:stop])
    assert [tuple(c) for c in store.chunks()][:5] == [(0, 8), (8, 16), (16, 19), (19, 27), (27, 28)]
    store.verify()


def test_every_finite_bfloat16_is_exact(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    values = bits.view(BF16).reshape(-1, 5)[: len(bits) // 5]
    store = write(tmp_path, [{"x": values}], {"x": Column((5,))}, chunk_rows=2048)
    assert (store.read("x").view(np.uint16) == values.view(np.uint16)).all()


def test_rounds_to_nearest_even_like_jax(tmp_path):
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    store = write(tmp_path, [{"x": x}], {"x": Column((5,))})
    assert (store.read("x") == np.asarray(jnp.asarray(x).astype(jnp.bfloat16))).all()


def test_chunks_of_zeros_are_written(tmp_path):
    columns = {"x": Column((5,), "float32")}
    store = write(tmp_path, [{"x": np.zeros((32, 5), np.float32)}], columns)
    shard = tmp_path / store.manifest.segments[0].path / "x" / "c" / "0" / "0"
    assert shard.stat().st_size == 4 * (8 * 5 * 4 + 4) + 4 * 16 + 4
    assert not store.read("x").any()


def test_statistics_are_numpys_in_float64(tmp_path):
    parts = [make_rows(n, seed=n) for n in (600, 40, 1300)]
    parts[1]["y"] *= 1000
    store = write(tmp_path, parts)
    for name in ("x", "y"):
        all_rows = np.concatenate([p[name] for p in parts]).astype(np.float64)
        stats, flat = store.stats[name], all_rows.reshape(len(all_rows), -1)
        assert stats.count == 1940
        np.testing.assert_allclose(stats.mean, all_rows.mean(axis=0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(stats.variance, all_rows.var(axis=0), rtol=1e-11)
        np.testing.assert_allclose(stats.mean_sq_norm, (flat**2).sum(axis=1).mean(), rtol=1e-12)
    assert store.stats["tokens"].count == 1940
    with pytest.raises(ValueError, match="not floating point"):
        _ = store.stats["tokens"].mean


def test_statistics_merge_to_the_whole():
    x = np.random.default_rng(0).standard_normal((1000, 4))
    merged = ColumnStats.of(x[:300]).merge(ColumnStats.of(x[300:]))
    np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12)
    assert merged.count == 1000


def test_norms_are_counted_exactly_and_merge(tmp_path):
    rng = np.random.default_rng(0)
    rows = [np.exp(rng.standard_normal((n, 1))) * rng.standard_normal((n, 5)) for n in (700, 1, 99)]
    rows[1][:] = 0
    store = write(tmp_path, [{"x": x} for x in rows], {"x": Column((5,), "float32")})
    x = np.concatenate(rows).astype(np.float32)
    norms = np.linalg.norm(x.astype(np.float64), axis=1).astype(np.float32)
    keys, counts = np.unique(norms.view(np.uint32) >> 16, return_counts=True)
    assert store.stats["x"].norms == dict(zip(keys.tolist(), counts.tolist()))
    assert store.stats["x"].norms == ColumnStats.of(x).norms
    for q in (0.01, 0.5, 0.9, 1.0):
        exact = np.quantile(norms, q, method="inverted_cdf")
        assert store.stats["x"].norm_quantile(q) == pytest.approx(exact, rel=0.004)
    old = ColumnStats(3, np.zeros(5), np.ones(5))  # as older stores have them: norms are not known
    assert store.stats["x"].merge(old).norms is None
    with pytest.raises(ValueError, match="not counted"):
        old.norm_quantile(0.5)


def test_digest_is_of_content_not_of_names_or_attempts(tmp_path):
    rows, meta = make_rows(20), {"a": 1}
    first = write(tmp_path / "1", [rows], meta=meta)
    second = write(tmp_path / "2", [rows], meta=meta)
    assert first.manifest.segments[0].path != second.manifest.segments[0].path
    assert first.digest == second.digest
    other = {**rows, "tokens": rows["tokens"] + 1}
    assert write(tmp_path / "3", [other], meta=meta).digest != first.digest
    assert write(tmp_path / "4", [rows], meta={"a": 2}).digest != first.digest


def test_append_takes_a_copy_and_many_kinds_of_arrays(tmp_path):
    x = np.ones((4, 5), np.float32)
    with StoreWriter(tmp_path, {"x": Column((5,)), "n": Column((), "int32")}) as writer:
        writer.append({"x": x, "n": np.arange(4)})  # int64 that fits
        x[:] = 7
        writer.append({"x": jnp.full((2, 5), 2.0), "n": np.array([4, 5], np.uint8)})
        writer.append({"x": [[3.0] * 5], "n": [6]})
        writer.finish()
    store = Store.open(tmp_path)
    assert store.read("x")[:, 0].astype(int).tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert store.read("n").tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_goes_on_at_the_last_commit(tmp_path):
    a, b, c = (make_rows(n, seed=n) for n in (10, 11, 12))
    with StoreWriter(tmp_path, COLUMNS, {"v": [1, 2]}, chunk_rows=8) as writer:
        assert writer.cursor == {}
        writer.append(a)
        writer.commit({"next": 10})
        writer.append(b)  # never committed: the process ends here
    assert not Store.open(tmp_path).complete
    with StoreWriter(tmp_path, COLUMNS, {"v": (1, 2)}, chunk_rows=8) as writer:
        assert writer.cursor == {"next": 10} and writer.rows == 10
        writer.append(c)
        writer.commit({"next": 22})
        writer.commit({"next": 30})  # no rows: the cursor alone moves on
        writer.finish()
    with StoreWriter(tmp_path, COLUMNS, {"v": [1, 2]}, chunk_rows=8) as writer:
        assert writer.complete and writer.cursor == {"next": 30}
        with pytest.raises(StoreError, match="is complete"):
            writer.append(a)
    store = Store.open(tmp_path)
    assert same(store.read("x"), np.concatenate([a["x"], c["x"]]))
    assert store.stats["x"].count == 22


def test_leftovers_of_killed_attempts_go_and_nothing_else(tmp_path):
    write(tmp_path, [make_rows(9)], chunk_rows=8)
    left = tmp_path / "segment-000001-0123456789ab" / "x"
    left.mkdir(parents=True)
    (tmp_path / "manifest.json.tmp").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    assert Store.open(tmp_path).rows == 9  # a reader looks past them, and removes nothing
    assert left.exists()
    StoreWriter(tmp_path, COLUMNS, {"made": "here"}, chunk_rows=8).close()
    assert not left.parent.exists() and not (tmp_path / "manifest.json.tmp").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert Store.open(tmp_path).rows == 9


@pytest.mark.parametrize(
    ("columns", "meta", "chunk_rows", "named"),
    [
        ({**COLUMNS, "x": Column((6,))}, {"made": "here"}, 8, "columns"),
        (COLUMNS, {"made": "there"}, 8, "made: 'here' there, 'there' now"),
        (COLUMNS, {"made": "here", "more": 1}, 8, "more: None there, 1 now"),
        (COLUMNS, {"made": "here"}, 16, "chunk_rows: 8 there, 16 now"),
    ],
)
def test_refuses_to_go_on_with_another_store(tmp_path, columns, meta, chunk_rows, named):
    write(tmp_path, [make_rows(9)])
    with pytest.raises(StoreError, match="another configuration") as error:
        StoreWriter(tmp_path, columns, meta, chunk_rows=chunk_rows)
    assert named in str(error.value)
    assert Store.open(tmp_path).rows == 9


def test_one_writer_at_a_time(tmp_path):
    with StoreWriter(tmp_path, COLUMNS):
        with pytest.raises(StoreError, match=r"is being written by process \d+"):
            StoreWriter(tmp_path, COLUMNS)
    StoreWriter(tmp_path, COLUMNS).close()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="not empty and not a store"):
        StoreWriter(tmp_path, COLUMNS)
    with pytest.raises(StoreError, match="cannot write a store"):
        StoreWriter(tmp_path / "thesis.tex" / "store", COLUMNS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": None}, r"rows have the columns \['tokens', 'y'\]"),
        ({"z": np.zeros(4)}, "append all columns together"),
        ({"x": np.zeros((4, 6))}, r"shape \(4, 6\); expected \[rows, 5\]"),
        ({"x": np.zeros((3, 5))}, "unequal length"),
        ({"tokens": np.zeros(4)}, "'tokens' is int32, its values are float64"),
        ({"x": np.zeros((4, 5), int)}, "'x' is bfloat16, its values are int64"),
        ({"tokens": np.array([0, 1, 2, 2**31])}, "values go from 0 to 2147483648"),
        ({"x": np.full((4, 5), 3.4e38, np.float32)}, "NaN or infinite"),
        ({"y": np.full((4, 2, 3), 1e300)}, "NaN or infinite"),
    ],
)
def test_append_refuses_what_does_not_fit_and_takes_nothing(tmp_path, change, match):
    rows = {k: v for k, v in {**make_rows(4), **change}.items() if v is not None}
    with StoreWriter(tmp_path, COLUMNS) as writer:
        with pytest.raises(StoreError, match=match):
            writer.append(rows)
        assert writer.buffered == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "y"])
def test_nan_is_refused_with_count_row_and_column(tmp_path, name, bad):
    with StoreWriter(tmp_path, COLUMNS) as writer:
        writer.append(make_rows(10))
        writer.commit({})
        writer.append(make_rows(5))
        rows = make_rows(20)
        rows[name].reshape(20, -1)[[3, 3, 9], [1, 2, 4]] = bad
        with pytest.raises(StoreError) as error:
            writer.append(rows)
        assert writer.buffered == 5
    for part in (f"'{name}' has 3 values", "in 2 of 20 rows", "row 18 of the store, element 1"):
        assert part in str(error.value)


def test_memory_for_what_is_not_committed_is_bounded(tmp_path):
    with StoreWriter(tmp_path, {"x": Column((5,))}, max_buffer_bytes=100 * 10) as writer:
        writer.append({"x": np.zeros((90, 5))})
        with pytest.raises(StoreError, match="memory was allowed for 100: commit more often"):
            writer.append({"x": np.zeros((11, 5))})
        writer.commit({})
        writer.append({"x": np.zeros((100, 5))})


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "at least one column"),
        ({"a/b": Column()}, "letters, digits"),
        ({"..": Column()}, "letters, digits"),
        ({"x": Column((3,), "float64")}, "dtype is 'float64'; a store holds"),
        ({"x": Column((0,))}, "positive sizes"),
        ({"x": Column(), "X": Column()}, "differ in case only"),
    ],
)
def test_columns_are_checked_before_anything_is_made(tmp_path, columns, match):
    with pytest.raises(StoreError, match=match):
        StoreWriter(tmp_path / "new", columns)
    assert not (tmp_path / "new").exists()


def test_meta_and_cursor_must_be_json(tmp_path):
    for meta in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(StoreError, match="must be JSON"):
            StoreWriter(tmp_path, COLUMNS, meta)
    with StoreWriter(tmp_path, COLUMNS) as writer:
        with pytest.raises(StoreError, match="the cursor of a store must be JSON"):
            writer.commit({"a": {1, 2}})


def test_a_column_that_is_not_there_or_of_another_width_is_named(tmp_path):
    store = write(tmp_path, [make_rows(9)])
    with pytest.raises(StoreError, match=r"no column 'z'; it has x \[5\] bfloat16, y \[2, 3\]"):
        store.read("z")
    with pytest.raises(StoreError, match=r"rows of shape \(5,\); expected width 6"):
        store.column("x", width=6)
    assert store.column("x", width=5).dtype == "bfloat16"
    for start, stop in ((-1, 3), (0, 10), (5, 4)):
        with pytest.raises(StoreError, match="it has 9"):
            store.read("x", start, stop)


def test_the_manifest_says_what_is_there(tmp_path):
    write(tmp_path, [make_rows(9), make_rows(4)])
    body = json.loads((tmp_path / "manifest.json").read_text())
    assert (body["format"], body["version"], body["rows"]) == ("saex-store", 1, 13)
    assert body["columns"]["y"] == {"shape": [2, 3], "dtype": "float32"}
    sums = {"count", "mean", "mean_sq_norm", "sum", "sum_sq", "norms"}
    assert set(body["stats"]["x"]) == sums and set(body["stats"]["tokens"]) == {"count"}
    assert [s["cursor"] for s in body["segments"]] == [{"next": 1}, {"next": 2}]
    on_disk = {
        f"{s['path']}/{name}": record["bytes"]
        for s in body["segments"]
        for name, record in s["files"].items()
    }
    found = {
        str(p.relative_to(tmp_path)): p.stat().st_size
        for p in tmp_path.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", "writer.lock")
    }
    assert on_disk == found
