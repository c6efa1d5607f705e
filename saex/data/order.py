"""The order of rows: a pure function of the seed, with no state to save.

The stream is one endless sequence of rows, dealt out to `lanes` in turn: row s of it is row s //
lanes of lane s % lanes. The rows [e * R, (e + 1) * R) of the sequence are epoch e. An epoch takes
the chunks of the store in a random order in which the chunks of each segment are spread evenly, and
deals them to the lanes in turn, moving rows from lane to lane until each has its share;
a lane cuts its share into windows of equal numbers of chunks, and each window gives its rows in
random order. So where a lane's row number r lies follows from prefix sums, without any replay,
and a process that serves some lanes reads the chunks of these lanes alone.

A segment's rows are of few documents where contexts are long, so windows that have as many chunks
of one segment as of any other are better mixed than windows of chunks drawn at random: of 20
million rows in contexts of 2048 a batch has rows of 99% instead of 95% of the documents that a
random draw has (experiments/benchmarks/stream_mixing.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Of the order, in checkpoints: a run that goes on in another order would repeat and skip rows.
VERSION = 2
# Which of the draws of an epoch: its order of chunks, the order of rows in a window of a lane, or
# the places of chunks in their segments' shares.
_CHUNKS, _ROWS, _PLACES = 0, 1, 2


class Piece(NamedTuple):
    """Rows [start, stop) of one shuffled window of one epoch."""

    epoch: int
    window: int
    start: int
    stop: int


class Layout(NamedTuple):
    """A lane's share of one epoch.

    chunks: [chunks] int64, in the order in which they are read. begins, ends: [chunks] int64, which
    of a chunk's kept rows are in the share (of the first and the last chunk maybe not all are).
    chunk_ends, row_ends: [windows] int64, where windows end among the chunks and the rows.
    """

    chunks: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    chunk_ends: np.ndarray
    row_ends: np.ndarray


class Epochs:
    """The order of chunks in each epoch; what the lanes of a store share.

    Attributes:
      kept: [chunks] int64, rows of each chunk that are streamed; at least one in all.
      key: what all draws depend on.
      lanes: that the chunks are dealt to.
      rows: kept rows, the length of an epoch.
    """

    def __init__(
        self, kept: np.ndarray, *key: int, lanes: int = 1, segments: np.ndarray | None = None
    ):
        """Of `segments`, [chunks] integers, the segment that each chunk is of; None: all of one."""
        self.kept, self.key, self.lanes, self.rows = kept, key, lanes, int(kept.sum())
        self._segments = np.zeros(len(kept), np.int64) if segments is None else segments
        self._filled = np.flatnonzero(kept)
        # Threads ask for the same one or two epochs again and again.
        self.chunks = functools.lru_cache(maxsize=4)(self._chunks)

    def _chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks that have kept rows, lane by lane in their order, and where they end among
        these rows.
        """
        chunks = self._filled[self._spread(self._segments[self._filled], epoch)]
        chunks = np.concatenate([chunks[lane :: self.lanes] for lane in range(self.lanes)])
        return chunks, np.cumsum(self.kept[chunks])

    def _spread(self, segments: np.ndarray, epoch: int) -> np.ndarray:
        """A random order of chunks, int64: of a segment with c of them one in each cth of it."""
        n = len(segments)
        shuffled = permutation(n, *self.key, epoch, _CHUNKS)
        shuffled = shuffled[np.argsort(segments[shuffled], kind="stable")]  # segment by segment
        _, starts, counts = np.unique(segments[shuffled], return_index=True, return_counts=True)
        number = np.arange(n) - np.repeat(starts, counts)
        jitter = permutation(n, *self.key, epoch, _PLACES) / n
        return shuffled[np.argsort((number + jitter) / np.repeat(counts, counts), kind="stable")]


class Order:
    """Where each row of one lane lies.

    Attributes:
      window: chunks that are shuffled together.
    """

    def __init__(self, epochs: Epochs, window: int, lane: int = 0):
        self._epochs, self._lane, self._lanes = epochs, lane, epochs.lanes
        self.window = window
        self._layout = functools.lru_cache(maxsize=4)(self._make_layout)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The windows' parts that rows [start, stop) of the lane are made of, in order."""
        while start < stop:
            epoch = (start * self._lanes + self._lane) // self._epochs.rows
            at, ends = start - self._first(epoch, self._lane), self._layout(epoch).row_ends
            window = int(np.searchsorted(ends, at, side="right"))
            begin = at - (int(ends[window - 1]) if window else 0)
            rows = min(stop - start, int(ends[window]) - at)
            yield Piece(epoch, window, begin, begin + rows)
            start += rows

    def windows(self, epoch: int) -> int:
        """Windows of an epoch; 0 where there are fewer rows than lanes and this one gets none."""
        return len(self._layout(epoch).row_ends)

    def chunks(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chunks of a window in the order in which they are read, and from which to which of
        its kept rows each belongs to it; int64.
        """
        layout = self._layout(epoch)
        begin = int(layout.chunk_ends[window - 1]) if window else 0
        part = slice(begin, int(layout.chunk_ends[window]))
        return layout.chunks[part], layout.begins[part], layout.ends[part]

    def shuffle(self, epoch: int, window: int) -> np.ndarray:
        """The permutation of the rows of a window, int64."""
        _, begins, ends = self.chunks(epoch, window)
        rows = int((ends - begins).sum())
        return permutation(rows, *self._epochs.key, epoch, _ROWS, self._lane, window)

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The (epoch, window) that follows."""
        if window + 1 < self.windows(epoch):
            return epoch, window + 1
        epoch += 1
        while not self.windows(epoch):
            epoch += 1
        return epoch, 0

    def _first(self, epoch: int, lane: int) -> int:
        """A lane's first row in an epoch: the first r with r * lanes + lane in it."""
        return -((lane - epoch * self._epochs.rows) // self._lanes)

    def _make_layout(self, epoch: int) -> Layout:
        chunks, ends = self._epochs.chunks(epoch)
        counts = [self._first(epoch + 1, n) - self._first(epoch, n) for n in range(self._lane + 1)]
        low, high = sum(counts[:-1]), sum(counts)
        part = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high)) + 1)
        if low == high:
            part = slice(0, 0)
        chunks, ends = chunks[part], ends[part]
        before = ends - self._epochs.kept[chunks]
        begins, ends = np.maximum(low, before) - before, np.minimum(high, ends) - before
        # Windows of equal size, so that an epoch does not end in a small, badly mixed one.
        windows = -(-len(chunks) // self.window)
        chunk_ends = np.arange(1, windows + 1) * len(chunks) // max(1, windows)
        row_ends = np.cumsum(ends - begins)[chunk_ends - 1]
        return Layout(chunks, begins, ends, chunk_ends, row_ends)


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of n things, int64, that is the same in every version of numpy.

    numpy promises the raw bits of a bit generator, not what `Generator.permutation` makes of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key[0], spawn_key=key[1:])).random_raw(n)
    # A stable argsort of the bits, digit by digit: numpy sorts 16 bits by radix, and four such
    # sorts of the rows of a window take half the time of one that compares 64.
    order = np.arange(n)
    for digit in np.ascontiguousarray(bits, "<u8").view("<u2").reshape(n, 4).T:
        order = order[np.argsort(digit[order], kind="stable")]
    return order
