"""Windows in memory: read, put in order, kept while they are used, and read ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from saex.data import quantise
from saex.data.exclude import Kept
from saex.data.manifest import Column
from saex.data.order import Order
from saex.data.raw import bits
from saex.data.split import Part
from saex.data.store import Store

# In use, read ahead, and one more while batches of two windows are made side by side.
_SLOTS = 3


@dataclass(frozen=True)
class Window:
    """Rows of one window.

    Attributes:
      buffers: column that is stored -> [>= rows, *shape], as read; of windows on devices these
        for each device.
      order: [kept rows] int64, places in the buffers in the order of the stream.
      columns: the columns that rows are taken of.
    """

    buffers: dict[str, Any]
    order: np.ndarray
    columns: dict[str, Column]

    def take(self, start: int, stop: int, out: dict[str, np.ndarray], at: int) -> None:
        """Copies rows [start, stop) of the window's order to `out[column][at:]`."""
        places = self.order[start:stop]
        for name, column in self.columns.items():
            target = out[name][at : at + len(places)]
            if column.stored:
                # "clip" because numpy buffers the whole output where it has to check the places.
                np.take(bits(self.buffers[name]), places, axis=0, out=bits(target), mode="clip")
            else:  # in memory as on disk, a byte a channel, until a row is needed
                arrays = {n: self.buffers[n][places] for n in quantise.parts(name, column)}
                quantise.decode(name, column, arrays, target)


@dataclass
class _Slot:
    future: Future[Window]
    users: int = 0


class Windows:
    """The windows that are in use, and the next one, in buffers that are used again.

    Fresh memory is slow on first touch, so the buffers of a window that nobody uses any more take
    the next one. Safe to use from several threads.
    """

    def __init__(
        self,
        store: Store | Part,
        names: Sequence[str],
        order: Order,
        kept: Kept,
        reader: Executor,
        checksums: bool = False,
    ):
        """Prepares to read the columns `names` by the threads of `reader`; reads nothing yet."""
        self._checksums, self._reader = checksums, reader
        self._store, self._order, self._kept = store, order, kept
        self._columns = {name: store.column(name) for name in names}
        self._stored: dict[str, Column] = {}
        for name, column in self._columns.items():
            self._stored |= quantise.parts(name, column) or {name: column}
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._free: list[dict[str, np.ndarray]] = []
        self._lock = threading.Lock()
        # A store whose rows are dear to make says that it has no memory for a third window.
        self._most = getattr(store, "windows_held", _SLOTS)

    @property
    def rows(self) -> int:
        """Upper bound of the rows of a window, excluded ones counted."""
        chunks = min(self._order.window, len(self._kept.chunks))
        return min(chunks * self._store.chunk_rows, self._store.rows)

    @property
    def nbytes(self) -> int:
        """Upper bound of the memory of one window; three are held at most in steady state."""
        return self.rows * sum(column.row_bytes for column in self._stored.values())

    def want(self, epoch: int, window: int) -> None:
        """Starts to read the window if it is not there."""
        with self._lock:
            self._slot((epoch, window))

    @contextmanager
    def borrow(self, epoch: int, window: int) -> Iterator[Window]:
        """The window, read if it is not there; its buffers stay as they are inside the block.

        Raises:
          StoreError: the store is damaged.
        """
        with self._lock:
            slot = self._slot((epoch, window))
            slot.users += 1
            ahead = self._order.after(epoch, window)
            # Only into a free slot: what is read ahead must not push out what is in use.
            if ahead not in self._slots and self._room():
                self._slot(ahead)
        try:
            yield slot.future.result()
        finally:
            with self._lock:
                slot.users -= 1

    def close(self) -> None:
        """Lets go of the memory; the reader's threads must have ended."""
        self._slots.clear()
        self._free.clear()

    def _slot(self, key: tuple[int, int]) -> _Slot:
        slot = self._slots.get(key)
        if slot is not None and slot.future.done() and slot.future.exception():
            del self._slots[key]  # a failed read is tried again, not remembered
            slot = None
        if slot is None:
            self._room()
            slot = self._slots[key] = _Slot(self._reader.submit(self._read, *key))
        return slot

    def _room(self) -> bool:
        """Drops idle windows, the oldest first, until a slot is free; whether one is."""
        for key, slot in list(self._slots.items()):
            if len(self._slots) < self._most:
                break
            if not slot.users and slot.future.done():
                del self._slots[key]
                if not slot.future.exception():
                    self._free.append(slot.future.result().buffers)
        return len(self._slots) < self._most

    def _read(self, epoch: int, window: int) -> Window:
        with self._lock:
            buffers = self._free.pop() if self._free else None
        buffers = self._new_buffers() if buffers is None else buffers
        chunks, begins, ends = self._order.chunks(epoch, window)
        ranges = [(int(a), int(b)) for a, b in self._kept.chunks[chunks]]
        for name, buffer in buffers.items():
            self._store.read_ranges(name, ranges, buffer, self._checksums)
        places = self._kept.places(chunks, begins, ends)
        return Window(buffers, places[self._order.shuffle(epoch, window)], self._columns)

    def _new_buffers(self) -> dict[str, np.ndarray]:
        stored = self._stored.items()
        return {name: np.empty((self.rows, *c.shape), c.numpy_dtype) for name, c in stored}
