"""The order of rows: each once per epoch, a function of the seed alone, the same everywhere."""

import hashlib

import numpy as np
import pytest

from saex.data.order import Order, permutation


def epoch_rows(order, kept, start, stop):
    """(chunk, place in the chunk's kept rows) of rows [start, stop) of the sequence."""
    out = []
    for epoch, window, lo, hi in order.pieces(start, stop):
        chunks = order.chunks(epoch, window)
        rows = [(int(c), i) for c in chunks for i in range(kept[c])]
        out += [rows[i] for i in order.shuffle(epoch, window)[lo:hi]]
    return out


@pytest.mark.parametrize("window", [1, 3, 4, 100])
@pytest.mark.parametrize("empty", [False, True])
def test_each_row_once_per_epoch_in_another_order(window, empty):
    kept = np.random.default_rng(0).integers(0 if empty else 1, 9, 11)
    order = Order(kept, seed=3, window=window)
    everything = sorted((c, i) for c in range(11) for i in range(kept[c]))
    epochs = [epoch_rows(order, kept, e * order.rows, (e + 1) * order.rows) for e in range(3)]
    assert order.rows == kept.sum()
    for rows in epochs:
        assert sorted(rows) == everything and rows != everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_stretch_is_the_part_of_the_whole_that_it_should_be():
    kept = np.random.default_rng(1).integers(0, 9, 20)
    order = Order(kept, seed=0, window=3)
    whole = epoch_rows(order, kept, 0, 3 * order.rows)
    rng = np.random.default_rng(2)
    for _ in range(50):
        start, stop = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
        assert epoch_rows(Order(kept, 0, 3), kept, start, stop) == whole[start:stop]


def test_windows_are_of_equal_size_and_cover_an_epoch():
    order = Order(np.full(65, 10), seed=0, window=32)
    sizes = [len(order.chunks(0, w)) for w in range(order.windows)]
    assert sum(sizes) == 65 and max(sizes) - min(sizes) <= 1 and max(sizes) <= 32
    chunks = np.concatenate([order.chunks(0, w) for w in range(order.windows)])
    assert sorted(chunks) == list(range(65)) and chunks.tolist() != list(range(65))
    assert order.chunks(0, 0).tolist() != order.chunks(1, 0).tolist()
    assert order.shuffle(0, 0)[:200].tolist() != order.shuffle(0, 1)[:200].tolist()
    assert order.after(0, 0) == (0, 1) and order.after(4, order.windows - 1) == (5, 0)


def test_seeds_epochs_and_windows_have_orders_of_their_own():
    orders = {
        permutation(50, *key).tobytes() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(orders) == 4
    assert sorted(permutation(50, 2**80, 7)) == list(range(50))


def test_the_order_is_the_same_on_every_machine_and_numpy():
    """If this fails, resumed runs see other data: it must not, whatever the versions are."""
    assert permutation(8, 0, 1, 2).tolist() == [1, 7, 0, 3, 5, 4, 6, 2]
    kept = np.array([5, 0, 7, 7, 3, 7, 7, 7, 2])
    rows = np.array(epoch_rows(Order(kept, 1, 2), kept, 0, 2 * int(kept.sum())))
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "078681c9da57ba0b"
    text = permutation(100_000, 5, 0, 0).astype("<i8").tobytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "eed03d56914c223d"
