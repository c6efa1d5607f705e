"""Lanes and mixtures: the same batches for any number of processes, shares that are exact."""

import json

import jax
import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.mixed import Mixed, Shares, open_mixed
from saex.data.split import open_split
from saex.data.stream import Stream


def write(path, rows, first=0, context=10, shuffled=True):
    """Row r holds first + r; documents of 10 rows, in the order of a random permutation."""
    n = np.arange(rows)
    n = np.random.default_rng(0).permutation(n) if shuffled else n
    columns = {name: Column((), "int32") for name in ("n", "document", "position")}
    with StoreWriter(path, columns, {"first": first}, chunk_rows=16) as writer:
        writer.append({"n": first + n, "document": n // context, "position": n % context})
        writer.finish()
    return Store.open(path)


PLAIN = {"exclude_positions": (), "threads": 0}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_batches_and_only_its_chunks(
    tmp_path, monkeypatch, processes
):
    store, share = write(tmp_path, 1600), 64 // processes
    whole = Stream(batch=64, window=16, **PLAIN).open(store, ["n"], 3)
    parts = [Stream(batch=64, window=16, **PLAIN).open(store, ["n"], 3) for _ in range(processes)]
    steps = [whole.gather(s * 64, s * 64 + 64)["n"] for s in range(25)]
    assert sorted(np.concatenate(steps)) == list(range(1600))  # 25 steps are an epoch
    read, original = [], Store.read_ranges

    def counted(self, name, ranges, out, checksums=False):
        read.extend(ranges)
        return original(self, name, ranges, out, checksums)

    monkeypatch.setattr(Store, "read_ranges", counted)
    for p, part in enumerate(parts):
        read.clear()
        for s, expected in enumerate(steps):
            rows = part.gather(s * 64 + p * share, s * 64 + (p + 1) * share)["n"]
            assert rows.tolist() == expected[p * share : (p + 1) * share].tolist()
        part.close()
        # Its share of the epoch, and what was read ahead: windows of 2 chunks in each of its lanes.
        assert sum(b - a for a, b in read) <= 1600 // processes + 8 // processes * 3 * 32
    whole.close()


def test_a_number_of_lanes_that_the_processes_do_not_divide_is_an_error(tmp_path, monkeypatch):
    store = write(tmp_path, 200)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"stream.lanes=8 cannot be shared by 3 .* such as 9"):
        Stream(batch=64).open(store, ["n"], 0)


def test_shares_of_a_mixture_are_exact_in_every_batch(tmp_path):
    a, b, c = write(tmp_path / "a", 500), write(tmp_path / "b", 90, 1000), write(
        tmp_path / "c", 330, 2000
    )  # fmt: skip
    mixed = Mixed([a, b, c], [5.0, 2.0, 1.0], tmp_path)
    batches = Stream(batch=64, window=24, **PLAIN).open(mixed, ["n"], 0)
    steps = [batches.gather(s * 64, s * 64 + 64)["n"] for s in range(60)]
    for step in steps:
        assert np.bincount(step // 1000, minlength=3).tolist() == [40, 16, 8]
    seen = np.concatenate(steps)
    # Each store goes through its own epochs: 2400 rows of a are 4.8, 960 of b are 10.7 of them.
    for low, rows, taken in ((0, 500, 2400), (1000, 90, 960), (2000, 330, 480)):
        counts = np.bincount(seen[(seen >= low) & (seen < low + 1000)] - low, minlength=rows)
        assert counts.sum() == taken
        assert counts.min() >= taken // rows - 1 and counts.max() <= taken // rows + 2
    again = Stream(batch=64, window=24, **PLAIN).open(mixed, ["n"], 0)
    for start, stop in ((0, 7), (100, 333), (61, 67), (640, 641)):
        assert again.gather(start, stop)["n"].tolist() == seen[start:stop].tolist()
    assert batches.info["stores/1/share"] == 0.25
    assert mixed.read("n", 480, 600).tolist() == [
        *a.read("n", 480),
        *b.read("n"),
        *c.read("n", 0, 10),
    ]
    batches.close(), again.close()


def test_counts_of_a_mixture_never_fall():
    for weights in ([1.0], [0.999, 0.001], [0.2] * 5, [0.5, 0.3, 0.2], [1e-6, 1 - 1e-6]):
        shares = Shares(weights)
        counts = [shares.before(i * shares.least) for i in range(2000)]
        assert all(sum(c) == i * shares.least for i, c in enumerate(counts))
        assert (np.diff(np.array(counts), axis=0) >= 0).all()
        np.testing.assert_allclose(np.array(counts[-1]) / sum(counts[-1]), weights, atol=1e-2)


def test_a_file_names_the_stores_to_mix(tmp_path):
    for name, first in (("a", 0), ("b", 5000)):
        write(tmp_path / name, 400, first)
    file = tmp_path / "mix.json"
    body = {"stores": [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]}
    file.write_text(json.dumps(body))
    train, heldout = open_split(file, "train"), open_split(file, "heldout")
    assert train.weights == (0.75, 0.25) and train.rows + heldout.rows == 800
    assert not set(train.read("n")) & set(heldout.read("n"))
    body["stores"][0]["weight"] = 2
    file.write_text(json.dumps(body))
    assert open_mixed(file, "train").digest != train.digest
    for text in ("", "[]", '{"stores": [{"path": "a"}]}', '{"stores": []}'):
        file.write_text(text)
        with pytest.raises(StoreError, match=r"mix.json"):
            open_mixed(file, "train")
    with pytest.raises(StoreError, match=r"weights are \[0.0, 1.0\]"):
        Mixed([train.stores[0], train.stores[1]], [0.0, 1.0], file)
    with pytest.raises(StoreError, match="no column 'x' in common"):
        train.column("x")
