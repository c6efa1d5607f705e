"""The order of rows: each once per epoch, a function of the seed alone, the same everywhere."""

import hashlib

import numpy as np
import pytest

from saex.data.order import Epochs, Order, permutation


def order_of(kept, seed=0, window=3, lane=0, lanes=1):
    return Order(Epochs(kept, seed, lanes=lanes), window, lane)


def epoch_rows(order, kept, start, stop):
    """(chunk, place in the chunk's kept rows) of rows [start, stop) of the lane."""
    out = []
    for epoch, window, lo, hi in order.pieces(start, stop):
        rows = [(int(c), i) for c, a, b in zip(*order.chunks(epoch, window)) for i in range(a, b)]
        assert all(i < kept[c] for c, i in rows)
        out += [rows[i] for i in order.shuffle(epoch, window)[lo:hi]]
    return out


@pytest.mark.parametrize("window", [1, 3, 4, 100])
@pytest.mark.parametrize("empty", [False, True])
def test_each_row_once_per_epoch_in_another_order(window, empty):
    kept = np.random.default_rng(0).integers(0 if empty else 1, 9, 11)
    order, total = order_of(kept, 3, window), int(kept.sum())
    everything = sorted((c, i) for c in range(11) for i in range(kept[c]))
    epochs = [epoch_rows(order, kept, e * total, (e + 1) * total) for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == everything and rows != everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_stretch_is_the_part_of_the_whole_that_it_should_be():
    kept = np.random.default_rng(1).integers(0, 9, 20)
    whole = epoch_rows(order_of(kept), kept, 0, 3 * int(kept.sum()))
    rng = np.random.default_rng(2)
    for _ in range(50):
        start, stop = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
        assert epoch_rows(order_of(kept), kept, start, stop) == whole[start:stop]


def test_windows_are_of_equal_size_and_cover_an_epoch():
    order = order_of(np.full(65, 10), window=32)
    parts = [order.chunks(0, w)[0] for w in range(order.windows(0))]
    sizes = [len(part) for part in parts]
    assert sum(sizes) == 65 and max(sizes) - min(sizes) <= 1 and max(sizes) <= 32
    chunks = np.concatenate(parts)
    assert sorted(chunks) == list(range(65)) and chunks.tolist() != list(range(65))
    assert parts[0].tolist() != order.chunks(1, 0)[0].tolist()
    assert order.shuffle(0, 0)[:200].tolist() != order.shuffle(0, 1)[:200].tolist()
    assert order.after(0, 0) == (0, 1) and order.after(4, order.windows(4) - 1) == (5, 0)


@pytest.mark.parametrize("lanes", [2, 3, 8])
@pytest.mark.parametrize("rows", [5, 57, 400])
def test_lanes_together_have_each_row_once_per_epoch(lanes, rows):
    """Row s of the sequence is row s // lanes of lane s % lanes; even with too few for all."""
    kept = np.bincount(np.random.default_rng(rows).integers(0, 11, rows), minlength=11)
    everything = sorted((c, i) for c in range(11) for i in range(kept[c]))
    orders = [order_of(kept, 5, 2, lane, lanes) for lane in range(lanes)]
    each = [epoch_rows(order, kept, 0, 4 * rows // lanes + 1) for order in orders]
    whole = [each[s % lanes][s // lanes] for s in range(4 * rows)]
    for epoch in range(4):
        assert sorted(whole[epoch * rows : (epoch + 1) * rows]) == everything
    for order in orders:
        at = (0, 0) if order.windows(0) else order.after(0, -1)
        for piece in order.pieces(0, 3 * rows // lanes):
            if (piece.epoch, piece.window) != at:
                at = order.after(*at)
            assert (piece.epoch, piece.window) == at


def test_a_lane_reads_its_share_of_the_chunks():
    kept = np.full(80, 10)
    for lane in range(8):
        order = order_of(kept, 0, 4, lane, 8)
        chunks = np.concatenate([order.chunks(0, w)[0] for w in range(order.windows(0))])
        assert len(chunks) == 10


@pytest.mark.parametrize("lanes", [1, 4])
def test_windows_have_like_numbers_of_chunks_of_each_segment(lanes):
    """Windows of an eighth of an epoch, of segments of 8, 16, 24... chunks."""
    segments = np.repeat(np.arange(10), 8 * np.arange(1, 11))
    kept = np.full(len(segments), 5)
    epochs = Epochs(kept, 0, lanes=lanes, segments=segments)
    window = len(segments) // 8 // lanes
    orders = [Order(epochs, window, lane) for lane in range(lanes)]
    for epoch in range(2):
        for at in range(8):
            chunks = np.concatenate([order.chunks(epoch, at)[0] for order in orders])
            counts = np.bincount(segments[chunks], minlength=10)
            assert np.abs(counts - np.arange(1, 11)).max() <= 2
    drawn = np.bincount(segments[np.random.default_rng(0).permutation(len(segments))[:window]])
    assert lanes > 1 or np.abs(drawn - np.arange(1, 11)).max() > 2, "the control"
    same = [
        Epochs(kept, 0, segments=s).chunks(e)[0].tolist() for s in (None, segments) for e in (0, 1)
    ]
    assert len({tuple(one) for one in same}) == 4


def test_seeds_epochs_and_windows_have_orders_of_their_own():
    orders = {
        permutation(50, *key).tobytes() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(orders) == 4
    assert sorted(permutation(50, 2**80, 7)) == list(range(50))


def test_the_order_is_the_same_on_every_machine_and_numpy():
    """If this fails, resumed runs see other data: with another `VERSION` they are refused."""
    assert permutation(8, 0, 1, 2).tolist() == [1, 7, 0, 3, 5, 4, 6, 2]
    kept = np.array([5, 0, 7, 7, 3, 7, 7, 7, 2])
    rows = np.array(epoch_rows(order_of(kept, 1, 2, 1, 3), kept, 0, int(kept.sum())))
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "4294865269e5d4fb"
    text = permutation(100_000, 5, 0, 0).astype("<i8").tobytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "eed03d56914c223d"
