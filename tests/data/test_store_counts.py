"""What a store counts: rows that were left out, sums over segments, rows that are lost."""

import json
import logging

import numpy as np
import pytest

from saex.data import Column, Store, StoreWriter, merge_parts
from saex.data import store_tools as tools
from saex.data.statistics import merge_all, stats_from_json, stats_to_json

COLUMNS = {"x": Column((3,), "float32"), "n": Column((), "int32")}


def rows_of(finite, bad=0, seed=0):
    """Rows, of which the last `bad` hold NaN."""
    x = np.random.default_rng(seed).standard_normal((finite + bad, 3)).astype(np.float32)
    x[finite:, 1] = np.nan
    return {"x": x, "n": np.arange(finite + bad)}


def dropping(path, **how):
    return StoreWriter(path, COLUMNS, chunk_rows=4, non_finite="drop", **how)


def counted(path):
    store = Store.open(path)
    return store.manifest.dropped, [s.dropped for s in store.manifest.segments]


@pytest.mark.parametrize("at_end", ["commit", "finish"])
def test_rows_that_are_dropped_after_the_last_row_that_is_kept_are_counted(tmp_path, at_end):
    with dropping(tmp_path) as writer:
        writer.append(rows_of(6, bad=1))
        writer.commit({"next": 7})
        writer.append(rows_of(0, bad=5))
        if at_end == "commit":
            writer.commit({"next": 12})
        assert writer.dropped == 6
        writer.finish()
        assert writer.dropped == 6
    assert counted(tmp_path) == (6, [1])
    assert tools.info(Store.open(tmp_path))["rows_dropped"] == 6


def test_they_outlast_a_kill_and_go_to_the_segment_whose_cursor_passes_them(tmp_path):
    with dropping(tmp_path) as writer:
        writer.append(rows_of(0, bad=2))
        writer.commit({"next": 2})
    assert counted(tmp_path) == (2, [])
    with dropping(tmp_path) as writer:
        assert writer.cursor == {"next": 2} and writer.dropped == 2
        writer.append(rows_of(4, bad=3))
        writer.commit({"next": 9})
        assert writer.dropped == 5
        writer.append(rows_of(0, bad=1))
        writer.commit({"next": 10})
        writer.append(rows_of(0, bad=1))  # not committed: made again
    with dropping(tmp_path) as writer:
        assert writer.dropped == 6
        writer.append(rows_of(2))
        writer.finish()
    assert counted(tmp_path) == (7 - 1, [5, 1])


def test_a_store_of_dropped_rows_alone_and_parts_of_them(tmp_path):
    for part, (finite, bad) in enumerate(((0, 3), (4, 2), (0, 4))):
        with dropping(tmp_path, part=(part, 3)) as writer:
            writer.append(rows_of(finite, bad))
            writer.finish()
    assert merge_parts(tmp_path).rows == 4
    assert counted(tmp_path) == (9, [2])


def texts(stats):
    return json.dumps(stats_to_json(stats))


def test_statistics_are_the_sum_over_all_segments_in_order_to_the_bit(tmp_path):
    """Also over a writer that was stopped: the numbers in the manifest hold all digits."""
    shapes = {name: column.shape for name, column in COLUMNS.items()}
    for start in (0, 7):
        with StoreWriter(tmp_path, COLUMNS, chunk_rows=4) as writer:
            for seed in range(start, start + 7):
                rows = rows_of(5 + seed, seed=seed)
                rows["x"] *= 10.0 ** (seed % 5)
                writer.append(rows)
                writer.commit({"next": seed})
    store = Store.open(tmp_path)
    parts = [
        stats_from_json(json.loads((store.folder(i) / "stats.json").read_text()), shapes)
        for i in range(14)
    ]
    assert texts(store.stats) == texts(merge_all(parts))
    backwards = texts(merge_all(parts[::-1]))
    assert backwards != texts(store.stats), "any order would do: the test shows nothing"
    assert store.stats["n"].count == store.rows


def test_statistics_of_a_store_that_lost_a_segment_stay_those_of_all_rows(tmp_path):
    import shutil

    def write(stop):
        with StoreWriter(tmp_path, COLUMNS, chunk_rows=4) as writer:
            for n in range(writer.cursor.get("next", 0), stop):
                writer.append(rows_of(9, seed=n))
                writer.commit({"next": n + 1})

    write(3)
    shutil.rmtree(tmp_path / Store.open(tmp_path).manifest.segments[0].path)
    write(5)
    with StoreWriter(tmp_path, COLUMNS, chunk_rows=4) as writer:
        assert writer.missing == [0] and writer.rows == 45
        before = texts(writer._manifest.stats)
        writer.append(rows_of(9))
        writer.commit({"next": 1}, replace=0)
    store = Store.open(tmp_path)
    assert texts(store.stats) == before and store.stats["x"].count == 45
    np.testing.assert_allclose(store.stats["x"].mean, store.read("x").mean(0), rtol=1e-6)


def test_rows_that_are_forgotten_are_told_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "saex"):
        with StoreWriter(tmp_path / "a", COLUMNS) as writer:
            writer.append(rows_of(4))
            writer.commit({})
            writer.append(rows_of(5))
    (record,) = caplog.records
    assert "a: 5 rows were appended and never committed" in record.getMessage()
    assert "call commit(cursor)" in record.getMessage() and Store.open(tmp_path / "a").rows == 4
    caplog.clear()
    with caplog.at_level(logging.WARNING, "saex"):
        with pytest.raises(RuntimeError, match="of the model"):
            with StoreWriter(tmp_path / "b", COLUMNS) as writer:
                writer.append(rows_of(4))
                raise RuntimeError("of the model")
        with StoreWriter(tmp_path / "b", COLUMNS) as writer:
            writer.append(rows_of(4))
            writer.finish()
    assert not caplog.records
