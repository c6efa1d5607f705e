"""Writing the rows of a live source into a store while a run trains on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from saex.data.manifest import MANIFEST
from saex.data.store import load_manifest
from saex.data.store_writer import StoreWriter

# Which draws of the seed are those of the order of rows in a segment.
_SHUFFLE = 1

log = logging.getLogger("saex")


class Tee:
    """Writes each chunk that the run needs once, whatever is made again after a kill.

    Each segment of the store says which chunks it holds, so after a kill the chunks that were not
    committed are known. They are written when the run makes them again, or else at the end.
    """

    def __init__(self, open_writer: Callable[[], StoreWriter], rows: int, seed: int | None):
        """Prepares; `plan` opens the folder.

        Args:
          open_writer: opens the store.
          rows: after which a segment is committed.
          seed: of the order of the rows in a segment; None leaves contexts together.
        """
        self._open, self._rows, self._seed = open_writer, rows, seed
        self._writer: StoreWriter | None = None
        self._todo: set[int] = set()
        self._pending: list[int] = []

    def plan(self, chunks: np.ndarray) -> None:
        """Opens the store and takes the chunks that the run needs; a complete one stays as it is.

        Args:
          chunks: their numbers, integers of any shape, some maybe twice.

        Raises:
          StoreError: the folder holds another store, or cannot be written.
        """
        self._writer = self._open()
        lacking = set(chunks.reshape(-1).tolist()) - _committed(self._writer)
        if not self._writer.complete:
            self._todo = lacking
        elif lacking:
            log.warning("%s is complete: what is new is trained on only", self._writer.path)

    def lacks(self, chunk: int) -> bool:
        """Whether the chunk is needed and not written."""
        return chunk in self._todo

    def add(self, chunk: int, rows: dict[str, np.ndarray]) -> None:
        """Writes the rows of a chunk that it lacks, {column: [rows, *shape]}.

        Raises:
          StoreError: as `StoreWriter.append` and `StoreWriter.commit`.
        """
        assert self._writer is not None, "plan comes first"
        self._writer.append(rows)
        self._todo.remove(chunk)
        self._pending.append(chunk)
        if self._writer.buffered >= self._rows:
            self._commit(self._writer)

    def finish(self, make: Callable[[Iterable[int]], Iterable[tuple[int, Any]]]) -> None:
        """Writes what is left and marks the store complete.

        Args:
          make: chunks -> (chunk, its rows) for each: makes what a killed attempt did not commit,
            and segments that somebody deleted.
        """
        if self._writer is None:
            return
        self._commit(self._writer)
        for missing in list(self._writer.missing):
            chunks = self._writer.span(missing)[1]["chunks"]
            for _, rows in make(chunks):
                self._writer.append(rows)
            order = self._order(chunks)
            self._writer.commit({"chunks": chunks}, replace=missing, shuffle=order)
        for chunk, rows in make(sorted(self._todo)):
            self.add(chunk, rows)
        self._commit(self._writer)
        self._writer.finish()

    def close(self) -> None:
        """Lets go of the folder."""
        if self._writer is not None:
            self._writer.close()

    def _commit(self, writer: StoreWriter) -> None:
        if self._pending:
            writer.commit({"chunks": self._pending}, shuffle=self._order(self._pending))
            self._pending = []

    def _order(self, chunks: list[int]) -> tuple[int, ...] | None:
        return None if self._seed is None else (self._seed, _SHUFFLE, chunks[0])


def _committed(writer: StoreWriter) -> set[int]:
    """The chunks that the segments of a store hold."""
    if not (writer.path / MANIFEST).exists():
        return set()
    segments = load_manifest(writer.path).segments
    return {chunk for segment in segments for chunk in segment.cursor["chunks"]}
