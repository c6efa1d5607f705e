"""One store as two: which rows fall where, and that a side reads like a store."""

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.split import held_out, open_split
from saex.data.stream import Stream
from saex.evals.heldout import context_starts

ROWS = 1003


def write(path, **integers):
    """Rows that hold their number, in chunks of 16 and segments of 200."""
    x = np.arange(ROWS, dtype=np.float32)[:, None] + np.zeros(3, np.float32)
    columns = {"x": Column((3,), "float32"), **{n: Column((), "int32") for n in integers}}
    with StoreWriter(path, columns, chunk_rows=16) as writer:
        for start in range(0, ROWS, 200):
            rows = {"x": x, **integers}
            writer.append({n: v[start : start + 200] for n, v in rows.items()})
            writer.commit({})
        writer.finish()
    return Store.open(path)


def numbers(side):
    return side.read("x")[:, 0].astype(int)


def test_the_sides_are_disjoint_and_together_the_store(tmp_path):
    write(tmp_path)
    train, heldout = (numbers(open_split(tmp_path, s)) for s in ("train", "heldout"))
    assert sorted([*train, *heldout]) == list(range(ROWS))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(heldout) > 0)
    assert 0.09 < len(heldout) / ROWS < 0.15
    assert list(heldout) == list(np.flatnonzero(held_out(np.arange(ROWS))))


def test_the_hash_is_fixed_and_well_spread():
    """A store must keep its sides on every machine and in every version."""
    assert list(np.flatnonzero(held_out(np.arange(40)))) == [3, 10, 18, 21]
    share = held_out(np.arange(10**6)).reshape(100, -1).mean(axis=1)
    assert abs(share.mean() - 0.12) < 0.001 and share.std() < 2 * (0.12 * 0.88 / 10**4) ** 0.5


@pytest.mark.parametrize("column", ["document", "position"])
def test_documents_and_contexts_stay_whole(tmp_path, column):
    n = np.arange(ROWS)
    write(tmp_path, **{column: n // 10 if column == "document" else n % 10})
    heldout = open_split(tmp_path, "heldout")
    groups = numbers(heldout) // 10
    counts = np.bincount(groups, minlength=101)
    assert set(counts[:100]) == {0, 10}
    if column == "position":
        assert set(np.diff(context_starts(heldout))) <= {10, 3}


@pytest.mark.parametrize("first", [0, 1])
def test_contexts_that_cannot_be_told_apart_are_told_of(tmp_path, caplog, first):
    """Also of stores whose contexts begin at position 1; not where a few rows are lacking."""
    n = np.arange(ROWS)
    kept = np.delete(n % 10 + first, np.arange(55, ROWS, 100))  # as the writer drops NaN
    fine = np.resize(kept, ROWS)
    order = np.random.default_rng(0).permutation(ROWS)
    for name, columns, warned in (
        ("in order", {"position": fine}, False),
        ("single", {"position": np.full(ROWS, first)}, False),
        ("shuffled", {"position": (n % 10 + first)[order]}, True),
        ("named", {"position": (n % 10 + first)[order], "document": (n // 10)[order]}, False),
    ):
        write(tmp_path / name, **columns)
        caplog.clear()
        for split in ("train", "heldout"):
            open_split(tmp_path / name, split)
        assert [r.levelname for r in caplog.records] == ["WARNING"] * warned, name
        assert not warned or "Write a column 'document'" in caplog.text


def test_any_range_of_a_side_is_what_lies_there(tmp_path):
    write(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        side = open_split(tmp_path, split)
        whole = numbers(side)
        for start, stop in np.sort(rng.integers(0, side.rows + 1, (20, 2)), axis=1):
            assert list(side.read("x", start, stop)[:, 0]) == list(whole[start:stop])
        ranges = side.chunks()
        assert np.all(ranges[:, 0] < ranges[:, 1]) and ranges[-1, 1] == side.rows
        out = np.empty((side.rows, 3), np.float32)
        shuffled = [(int(a), int(b)) for a, b in rng.permutation(ranges)]
        assert side.read_ranges("x", shuffled, out) == side.rows
        assert sorted(out[:, 0]) == list(whole)
        with pytest.raises(StoreError, match="rows"):
            side.read("x", 0, side.rows + 1)


def test_all_numbers_of_a_side_are_those_of_its_rows(tmp_path, monkeypatch):
    """Read in stretches that end in the middle of chunks and segments."""
    monkeypatch.setattr("saex.data.split._STRETCH", 77)
    n = np.arange(ROWS)
    write(tmp_path, document=n // 10, number=3 * n)
    for split, chosen in (("heldout", held_out(n // 10)), ("train", ~held_out(n // 10))):
        side = open_split(tmp_path, split)
        assert list(side.read("number")) == list(3 * n[chosen])
        assert list(side.read("number", 1)) == list(3 * n[chosen][1:])
        assert side.read("number", checksums=True).dtype == np.int32


def test_a_stream_of_a_side_gives_each_of_its_rows_once_an_epoch(tmp_path):
    n = np.arange(ROWS)
    write(tmp_path, document=n // 10, position=n % 10)
    side = open_split(tmp_path, "train")
    batches = Stream(batch=32, lanes=1, window=5).open(side, ["x"], seed=0)
    seen = batches.gather(0, batches.rows)["x"][:, 0].astype(int)
    batches.close()
    assert sorted(seen) == [i for i in numbers(side) if i % 10]  # position 0 is left out


def test_a_folder_of_two_stores_is_taken_as_it_is(tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "heldout")
    assert open_split(tmp_path, "train").rows == ROWS == open_split(tmp_path, "heldout").rows


def test_the_sides_have_identities_of_their_own(tmp_path):
    store = write(tmp_path)
    digests = {open_split(tmp_path, s).digest for s in ("train", "heldout")} | {store.digest}
    assert len(digests) == 3


def test_what_cannot_be_split_is_refused(tmp_path):
    write(tmp_path / "one", document=np.zeros(ROWS, np.int32))
    with pytest.raises(StoreError, match=r"no row to the (heldout|train) side"):
        for split in ("train", "heldout"):
            open_split(tmp_path / "one", split)
    with pytest.raises(ValueError, match="unknown split"):
        open_split(tmp_path / "one", "test")
    with pytest.raises(StoreError, match="does not exist"):
        open_split(tmp_path / "none", "train")
