"""The order of rows: a pure function of the seed, with no state to save.

The stream is one endless sequence of rows, epoch after epoch; batch i is the rows
[i * batch, (i + 1) * batch) of it. An epoch takes the chunks of the store in a random order, cuts
them into windows of equal numbers of chunks, and each window gives its kept rows in random order.
So where row number r of the sequence lies follows from prefix sums, without any replay.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Which of the draws of an epoch: its order of chunks, or the order of rows in window `_ROWS + w`.
_CHUNKS, _ROWS = 0, 1


class Piece(NamedTuple):
    """Rows [start, stop) of one shuffled window of one epoch."""

    epoch: int
    window: int
    start: int
    stop: int


class Layout(NamedTuple):
    """One epoch: the chunks in their order, and where windows end among chunks and kept rows."""

    chunks: np.ndarray
    chunk_ends: np.ndarray
    row_ends: np.ndarray


class Order:
    """Where each row of the endless sequence lies.

    Attributes:
      rows: kept rows, the length of an epoch.
      windows: windows per epoch.
    """

    def __init__(self, kept: np.ndarray, seed: int, window: int):
        """Prepares the order.

        Args:
          kept: [chunks] int64, rows of each chunk that are streamed; at least one in all.
          seed: any integer from 0.
          window: chunks that are shuffled together.
        """
        self._kept = kept
        self._seed = seed
        self.rows = int(kept.sum())
        self.windows = max(1, -(-len(kept) // window))
        # Threads ask for the same one or two epochs again and again.
        self._layout = functools.lru_cache(maxsize=4)(self._make_layout)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The windows' parts that rows [start, stop) of the sequence are made of, in order."""
        while start < stop:
            epoch, at = divmod(start, self.rows)
            ends = self._layout(epoch).row_ends
            window = int(np.searchsorted(ends, at, side="right"))
            begin = at - (int(ends[window - 1]) if window else 0)
            rows = min(stop - start, int(ends[window]) - at)
            yield Piece(epoch, window, begin, begin + rows)
            start += rows

    def chunks(self, epoch: int, window: int) -> np.ndarray:
        """The chunks of a window, int64, in the order in which they are read."""
        layout = self._layout(epoch)
        begin = int(layout.chunk_ends[window - 1]) if window else 0
        return layout.chunks[begin : int(layout.chunk_ends[window])]

    def shuffle(self, epoch: int, window: int) -> np.ndarray:
        """The permutation of the kept rows of a window, int64."""
        rows = int(self._kept[self.chunks(epoch, window)].sum())
        return permutation(rows, self._seed, epoch, _ROWS + window)

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The (epoch, window) that follows."""
        return (epoch, window + 1) if window + 1 < self.windows else (epoch + 1, 0)

    def _make_layout(self, epoch: int) -> Layout:
        chunks = permutation(len(self._kept), self._seed, epoch, _CHUNKS)
        # Windows of equal size, so that an epoch does not end in a small, badly mixed one.
        ends = np.arange(1, self.windows + 1) * len(chunks) // self.windows
        return Layout(chunks, ends, np.cumsum(self._kept[chunks])[ends - 1])


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of n things, int64, that is the same in every version of numpy.

    numpy promises the raw bits of a bit generator, not what `Generator.permutation` makes of them.
    """
    bits = np.random.Philox(np.random.SeedSequence(key[0], spawn_key=key[1:])).random_raw(n)
    return np.argsort(bits, kind="stable")
