"""Rows of the endless sequence, batch by batch, from the windows of every lane."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np

from saex.data.exclude import Kept
from saex.data.manifest import StoreError
from saex.data.mixed import Mixed, Shares
from saex.data.order import Epochs, Order, Piece
from saex.data.split import Part
from saex.data.store import Store
from saex.data.windows import Window, Windows

# Which draws of the seed are those of batches; the store's number follows.
_DRAWS = 0
# A window that is not told has these chunks at least, and so many rows.
_CHUNKS, _WINDOW_ROWS = 64, 131_072


class Span(NamedTuple):
    """Rows [start, stop) of one lane of one store, and their place in the output."""

    source: int
    lane: int
    start: int
    stop: int
    at: int


class Lanes:
    """Batch i holds, for each lane in turn, the lane's next rows, those of each store together.

    Which rows a batch holds, and where, depends on stores, rules, seed, batch, window and number of
    lanes, and on nothing else; who asks for the rows of some lanes reads their windows alone.

    Attributes:
      windows: windows of the first epoch, over all lanes and stores.
      rows, nbytes: upper bounds of what the windows in use hold together, excluded rows counted.
        In steady state up to three times as much is in memory.
    """

    def __init__(
        self,
        store: Store | Part | Mixed,
        kept: Sequence[Kept],
        names: Sequence[str],
        *,
        batch: int,
        lanes: int,
        window: int,
        seed: int,
        checksums: bool = False,
        make: Callable[..., Windows] = Windows,
    ):
        """Prepares; reads nothing yet.

        Args:
          store: one store or several.
          kept: of each store, the rows that are streamed.
          names: columns.
          batch: rows per batch, a multiple of lanes.
          lanes: see `saex.data.order`.
          window: chunks that are shuffled together, over all lanes and stores; 0: 64, or as many
            more as 131,072 rows need.
          seed: of all draws.
          checksums: whether they are checked.
          make: makes the windows of a lane, lane by lane.

        Raises:
          StoreError: a store without a row, or a batch too small for the stores' shares.
        """
        stores, weights = parts_of(store)
        self._share, self._lanes, self._batch = batch // lanes, lanes, batch
        self._shares = Shares(weights)
        _check(store, kept, self._share * lanes, self._shares.least * lanes)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="saex-window")
        self._orders: list[list[Order]] = []
        self._windows: list[list[Windows]] = []
        for i, (one, rows, weight) in enumerate(zip(stores, kept, weights)):
            segments = one.chunk_segments()
            epochs = Epochs(rows.counts, seed, _DRAWS, i, lanes=lanes, segments=segments)
            chunks = window or max(_CHUNKS, -(-_WINDOW_ROWS // one.chunk_rows))
            size = max(1, round(chunks * weight / lanes))
            orders = [Order(epochs, size, lane) for lane in range(lanes)]
            self._orders.append(orders)
            self._windows.append(
                [make(one, names, o, rows, self._reader, checksums) for o in orders]
            )

    @property
    def windows(self) -> int:
        """See the class."""
        return sum(order.windows(0) for orders in self._orders for order in orders)

    @property
    def rows(self) -> int:
        """See the class."""
        return sum(w.rows for windows in self._windows for w in windows)

    @property
    def nbytes(self) -> int:
        """See the class."""
        return sum(w.nbytes for windows in self._windows for w in windows)

    def gather(self, start: int, stop: int, out: dict[str, np.ndarray]) -> None:
        """Copies rows [start, stop) of the sequence of batches to `out`, [stop - start, *shape].

        Raises:
          StoreError: a store is damaged; names the file.
        """
        parts = self.pieces_of(start, stop)
        self.want(parts)
        for span, pieces in parts:
            at = span.at
            for piece in pieces:
                with self.borrow(span, piece) as window:
                    window.take(piece.start, piece.stop, out, at)
                at += piece.stop - piece.start

    def pieces_of(self, start: int, stop: int) -> list[tuple[Span, list[Piece]]]:
        """Where rows [start, stop) of the sequence of batches lie."""
        return [(span, list(self._pieces(span))) for span in self._spans(start, stop)]

    def want(self, parts: Sequence[tuple[Span, Sequence[Piece]]]) -> None:
        """Starts to read the windows of all of these, before what is read ahead."""
        for span, pieces in parts:
            for piece in pieces:
                self._windows[span.source][span.lane].want(piece.epoch, piece.window)

    def borrow(self, span: Span, piece: Piece) -> AbstractContextManager[Window]:
        """The window of a piece, as `Windows.borrow`."""
        return self._windows[span.source][span.lane].borrow(piece.epoch, piece.window)

    def windows_of(self, stop: int, lane: int) -> Iterator[np.ndarray]:
        """Of each window of a lane of the first store that rows [0, stop) of the sequence of
        batches come from, the numbers of its chunks, int64.
        """
        order, rows = self._orders[0][lane], -(-stop // self._batch) * self._share
        for piece in order.pieces(0, rows):
            yield order.chunks(piece.epoch, piece.window)[0]

    def close(self) -> None:
        """Stops reading ahead and lets go of the memory."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for windows in self._windows:
            for one in windows:
                one.close()

    def _pieces(self, span: Span) -> Iterator[Piece]:
        return self._orders[span.source][span.lane].pieces(span.start, span.stop)

    def _spans(self, start: int, stop: int) -> Iterator[Span]:
        """Rows of the sequence of batches -> rows of lanes and stores."""
        at = 0
        while at < stop - start:
            step, place = divmod(start + at, self._batch)
            lane, skip = divmod(place, self._share)
            end = min(self._share, skip + stop - start - at)
            # A lane's part of a batch: rows of the first store, then of the second, and so on.
            first, next_ = (self._shares.before((step + i) * self._share) for i in (0, 1))
            begin = 0
            for source, (a, b) in enumerate(zip(first, next_)):
                low, high = max(skip, begin), min(end, begin + b - a)
                if low < high:
                    yield Span(source, lane, a + low - begin, a + high - begin, at + low - skip)
                begin += b - a
            at += end - skip


def parts_of(store: Store | Part | Mixed) -> tuple[tuple[Store | Part, ...], tuple[float, ...]]:
    """The stores and their weights."""
    return (store.stores, store.weights) if isinstance(store, Mixed) else ((store,), (1.0,))


def _check(store: Store | Part | Mixed, kept: Sequence[Kept], batch: int, least: int) -> None:
    for one, rows in zip(parts_of(store)[0], kept):
        if not rows.counts.sum():
            raise StoreError(f"no row of {one.path} is left to stream; exclude fewer")
    if len(kept) > 1 and batch < least:
        raise StoreError(
            f"stream.batch={batch} is too small for the shares of {store.path}: at least {least}"
        )
