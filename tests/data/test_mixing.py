"""How well batches are mixed, by default and otherwise, and what is said of it."""

import logging

import numpy as np
import pytest
from scipy import stats

from saex.data import Column, Store, StoreWriter
from saex.data.mixed import Mixed
from saex.data.mixing import expected_distinct
from saex.data.stream import Stream
from saex.harvest import Harvest
from tests.data.test_lanes import PLAIN, write


def test_documents_of_a_random_batch():
    documents = np.repeat(np.arange(40), np.arange(1, 41))
    rng = np.random.default_rng(0)
    draws = [len(np.unique(rng.choice(documents, 100, replace=False))) for _ in range(2000)]
    assert expected_distinct(documents, 100) == pytest.approx(np.mean(draws), abs=0.15)
    assert expected_distinct(documents, len(documents)) == 40


def mixing(store, **options):
    batches = Stream(batch=256, **PLAIN, **options).open(store, ["n", "document", "position"], 0)
    steps = [batches.gather(s * 256, s * 256 + 256) for s in range(batches.rows // 256)]
    batches.close()
    return batches.info, steps


def test_the_default_mixes_as_rows_drawn_at_random(tmp_path):
    """Distinct documents per batch, mean position, and correlation of neighbours in a batch."""
    info, steps = mixing(write(tmp_path / "shuffled", 20_000))
    assert info["documents_per_batch"] >= 0.95 * info["documents_per_random_batch"]
    positions = np.concatenate([step["position"] for step in steps])
    noise = np.sqrt(99 / 12 / 256)  # positions 0 to 9 at random: standard error of a batch's mean
    means = [step["position"].mean() for step in steps]
    assert np.abs(np.array(means) - 4.5).max() < 5 * noise
    assert abs(stats.pearsonr(positions[1:], positions[:-1])[0]) < 4 / np.sqrt(len(positions))
    numbers = np.concatenate([step["n"] for step in steps])
    assert abs(stats.pearsonr(numbers[1:], numbers[:-1])[0]) < 4 / np.sqrt(len(numbers))


def test_a_small_window_over_rows_in_their_order_is_seen(tmp_path):
    """The control: the measure must tell a bad shuffle."""
    info, _ = mixing(write(tmp_path, 20_000, shuffled=False), window=1, lanes=1)
    assert info["documents_per_batch"] < 0.8 * info["documents_per_random_batch"]


@pytest.mark.parametrize("shuffled", [True, False])
def test_of_a_large_store_a_sample_of_rows_tells_nearly_the_same(tmp_path, monkeypatch, shuffled):
    store = write(tmp_path, 40_000, context=100, shuffled=shuffled)

    def told(**options):
        batches = Stream(batch=256, **{**PLAIN, **options}).open(store, ["n"], 0)
        batches.close()
        return batches.info

    for left_out in ({}, {"exclude_positions": tuple(range(0, 100, 3))}):
        exact = told(**left_out)
        monkeypatch.setattr("saex.data.mixing.WHOLE", 1000)
        monkeypatch.setattr("saex.data.mixing.SAMPLE", 4000)
        near = told(**left_out)
        monkeypatch.undo()
        assert near["documents_per_batch"] == exact["documents_per_batch"]
        random = exact["documents_per_random_batch"]
        assert 150 < random < 200
        assert near["documents_per_random_batch"] == pytest.approx(random, rel=0.02)
        assert near["documents_per_random_batch"] != random, "all rows were read"


def harvested(path, rows, context, cfg, first=0):
    """Contexts as a harvest writes them: one after the other, shuffled segment by segment."""
    columns = {name: Column((), "int32") for name in ("document", "position")}
    with StoreWriter(path, columns, {}, chunk_rows=cfg.chunk_rows) as writer:
        for start in range(0, rows, cfg.segment_rows):
            n = np.arange(start, min(start + cfg.segment_rows, rows), dtype=np.int32)
            writer.append({"document": first + n // context, "position": n % context})
            writer.commit({}, shuffle=(start,))
        writer.finish()
    return Store.open(path)


ROWS = 16_777_216


@pytest.mark.parametrize("context", [128, 2048])
def test_default_sizes_of_segments_chunks_and_windows_mix_a_large_store(tmp_path, context, caplog):
    """Sixteen million rows at the defaults of harvest and stream."""
    with caplog.at_level(logging.WARNING, logger="saex"):
        store = harvested(tmp_path / "default", ROWS, context, Harvest())
        batches = Stream(exclude_positions=()).open(store, ["document", "position"], 0)
        info, steps = batches.info, [batches.gather(s * 4096, s * 4096 + 4096) for s in range(4)]
        batches.close()
    assert info["documents_per_batch"] >= 0.98 * info["documents_per_random_batch"]
    assert not caplog.records
    distinct = [len(np.unique(step["document"])) for step in steps]
    assert info["documents_per_batch"] == pytest.approx(np.mean(distinct))
    drawn = np.random.default_rng(0).choice(ROWS, (20, 4096)) // context
    expected = np.mean([len(np.unique(row)) for row in drawn])
    assert info["documents_per_random_batch"] == pytest.approx(expected, rel=0.01)
    positions = np.concatenate([step["position"] for step in steps])
    noise = np.sqrt((context**2 - 1) / 12 / len(positions))
    assert abs(positions.mean() - (context - 1) / 2) < 5 * noise
    assert abs(stats.pearsonr(positions[1:], positions[:-1])[0]) < 4 / np.sqrt(len(positions))


def test_batches_that_are_badly_mixed_are_warned_of_with_the_mend(tmp_path, caplog):
    cfg = Harvest(segment_rows=8192, chunk_rows=2048)
    store = harvested(tmp_path, 262_144, 1024, cfg)
    with caplog.at_level(logging.WARNING, logger="saex"):
        Stream(exclude_positions=(), window=16).open(store, ["position"], 0).close()
    assert "larger stream.window (now 32768 rows)" in caplog.text
    assert "segment_rows" in caplog.text


def test_of_several_stores_documents_are_counted_apart_and_all_rows_told(tmp_path):
    stores = [harvested(tmp_path / str(i), 20_000, 10, Harvest(chunk_rows=16)) for i in (0, 1)]
    mixed = Mixed(stores, (3.0, 1.0), tmp_path / "mix.json")
    batches = Stream(batch=256, **PLAIN).open(mixed, ["document"], 0)
    batches.close()
    one = expected_distinct(np.arange(20_000) // 10, 192)
    other = expected_distinct(np.arange(20_000) // 10, 64)
    assert batches.info["documents_per_random_batch"] == pytest.approx(one + other)
    assert batches.info["documents_per_batch"] == pytest.approx(one + other, rel=0.05)
    assert batches.info["stores/0/share"] == 0.75
    assert batches.info["stores/1/rows_kept"] == 20_000
