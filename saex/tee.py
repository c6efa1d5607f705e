"""Writing the rows of a live source into a store while a run trains on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saex import distributed
from saex.data.manifest import MANIFEST, StoreError
from saex.data.store import load_manifest
from saex.data.store_merge import merge_parts
from saex.data.store_names import Names, part_of
from saex.data.store_writer import StoreWriter

# Which draws of the seed are those of the order of rows in a segment.
_SHUFFLE = 1

log = logging.getLogger("saex")


class Tee:
    """Writes each chunk that the run needs once, whatever is made again after a kill.

    Each segment of the store says which chunks it holds, so after a kill the chunks that were not
    committed are known. They are written when the run makes them again, or else at the end.
    """

    def __init__(
        self,
        path: Path,
        open_writer: Callable[..., StoreWriter],
        rows: int,
        seed: int | None,
        check_room: Callable[[int], str],
    ):
        """Prepares; `plan` opens the folder.

        Args:
          path: the store's.
          open_writer: (part=) opens it.
          rows: after which a segment is committed.
          seed: of the order of the rows in a segment; None leaves contexts together.
          check_room: (rows of the whole store) what they take and what is free, as text; raises
            StoreError where they have no room.
        """
        self._path, self._open, self._rows, self._seed = path, open_writer, rows, seed
        self._check_room = check_room
        self._writer: StoreWriter | None = None
        self._todo: set[int] = set()
        self._pending: list[int] = []

    def plan(self, chunks: set[int], rows: int) -> None:
        """Opens the store and takes the chunks that the run needs; a complete one stays as it is.

        Of several processes each has chunks of its own, and writes them as a part of the store.

        Args:
          chunks: of this process.
          rows: that all processes write together.

        Raises:
          StoreError: the folder holds another store, was begun by another number of processes,
            cannot be written, or lies on a disk without room for the rows.
        """
        count = jax.process_count()
        part = (jax.process_index(), count) if count > 1 else None
        if not _is_complete(self._path):
            _check_parts(self._path, count)
            self._tell_room(rows)
        self._writer = self._open(part=part)
        lacking = chunks - _committed(self._writer, Names(part).manifest)
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
        distributed.barrier(f"tee {self._path}")
        if jax.process_count() > 1 and distributed.is_main():
            merge_parts(self._path)
        distributed.barrier(f"tee merged {self._path}")

    def close(self) -> None:
        """Lets go of the folder."""
        if self._writer is not None:
            self._writer.close()

    def _tell_room(self, rows: int) -> None:
        try:
            told = self._check_room(rows)
        except StoreError as err:
            raise StoreError(f"live.tee=True would write {rows:,} rows: {err}") from err
        if distributed.is_main():
            log.info("%s: %s rows, %s", self._path, f"{rows:,}", told)

    def _commit(self, writer: StoreWriter) -> None:
        if self._pending:
            writer.commit({"chunks": self._pending}, shuffle=self._order(self._pending))
            self._pending = []

    def _order(self, chunks: list[int]) -> tuple[int, ...] | None:
        return None if self._seed is None else (self._seed, _SHUFFLE, chunks[0])


def _is_complete(path: Path) -> bool:
    return (path / MANIFEST).exists() and load_manifest(path).complete


def _check_parts(path: Path, count: int) -> None:
    """Refuses to go on with what another number of processes began: nobody would finish it."""
    begun = {part[1] for file in path.glob("manifest.*.json") if (part := part_of(file.name))}
    begun |= {1} if (path / MANIFEST).exists() else set()
    if begun - {count}:
        raise StoreError(
            f"{path} was begun by {begun.pop()} processes, here are {count}: go on with as many, "
            "or delete that folder, and it is written anew at the end of the run"
        )


def _committed(writer: StoreWriter, manifest: str) -> set[int]:
    """The chunks that the segments of a store, or of a part, hold."""
    if not (writer.path / manifest).exists():
        return set()
    segments = load_manifest(writer.path, manifest).segments
    return {chunk for segment in segments for chunk in segment.cursor["chunks"]}
