"""One store as two, by a hash of the document or row: what is trained on, what is held out."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from saex.data.lease import Lease
from saex.data.manifest import MANIFEST, STRING, Column, StoreError
from saex.data.ranges import row_range
from saex.data.raw import bits
from saex.data.store import Store
from saex.data.store_remote import RemotePath, is_remote, place
from saex.data.text import HELDOUT_SHARE, check_split

if TYPE_CHECKING:
    from saex.data.mixed import Mixed

DOCUMENT, POSITION = "document", "position"
# Bytes and chunks that are read side by side, before rows of the other side are left out.
_SCRATCH, _CHUNKS = 2**25, 128
# Rows of which a number each is read at once, where all are.
_STRETCH = 2**20
# Rows that are hashed together.
_BLOCK = 2**16
# Contexts that begin in the middle, as where rows were dropped, are told of beyond this share.
_BROKEN = 0.2

log = logging.getLogger("saex")


def open_split(path: str | os.PathLike, split: str) -> Store | Part | Mixed:
    """The training or the held-out side of what lies at ``path``.

    Args:
      path: a folder with the stores ``train`` and ``heldout``, as a harvest of text makes them, or
        one store, whose rows are then split by a hash: about 12% of its documents (column
        ``document``; without it, of its contexts by ``position``, else of its rows) are held out.
        Or a JSON file that names several of these, to be mixed (``saex.data.mixed.open_mixed``).
      split: "train" or "heldout".

    Raises:
      StoreError: no store there, or one that is damaged; a side that would have no row.
    """
    check_split(split)
    folder = Path(path)
    if is_remote(path):
        remote = place(path)
        whole = (remote / MANIFEST).exists()
        return Part(Store.open(path), split) if whole else Store.open(remote / split)
    if folder.suffix == ".json":
        from saex.data.mixed import open_mixed

        return open_mixed(folder, split)
    if not (folder / MANIFEST).exists():
        return Store.open(folder / split)
    part = Part(Store.open(folder), split)
    if part.rows == 0 and part.complete:
        raise StoreError(
            f"{folder} split by a hash leaves no row to the {split} side: give the store more "
            f"documents, or a folder with two stores, {folder.name}/train and {folder.name}/heldout"
        )
    return part


class Part:
    """The rows of an open store that fall to one side, read like a store of their own.

    Row i is the i-th row of that side. Which side a row falls to depends on its document (or row
    number) alone, so documents stay whole and keep their side when the store grows.
    """

    def __init__(self, store: Store, split: str):
        self._store, self._split = store, split
        heldout = held_out(_names(store, warn=split == "heldout"))
        self._mask = heldout if split == "heldout" else ~heldout
        self._chunks = store.chunks()
        starts = self._chunks[:, 0]
        kept = np.add.reduceat(self._mask, starts, dtype=np.int64) if len(starts) else starts
        self._ends = np.cumsum(kept)
        self._lease = Lease()

    @property
    def path(self) -> Path | RemotePath:
        """Folder of the whole store."""
        return self._store.path

    @property
    def rows(self) -> int:
        """Rows of this side."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def columns(self) -> dict[str, Column]:
        """Name -> shape and dtype of a row."""
        return self._store.columns

    @property
    def complete(self) -> bool:
        """Whether the producer of the store said that it was done."""
        return self._store.complete

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, at most."""
        return self._store.chunk_rows

    @property
    def digest(self) -> str:
        """SHA-256 (hex): the identity of this side's content."""
        return hashlib.sha256(f"{self._store.digest} {self._split}".encode()).hexdigest()

    def column(self, name: str, width: int | None = None) -> Column:
        """As ``Store.column``."""
        return self._store.column(name, width)

    def strings(self, name: str) -> tuple[str, ...]:
        """As ``Store.strings``, of the whole store."""
        return self._store.strings(name)

    def aligned(self, strings: Mapping[str, tuple[str, ...]]) -> Part:
        """As ``Store.aligned``."""
        other = copy.copy(self)
        other._store = self._store.aligned(strings)
        return other

    def chunks(self) -> np.ndarray:
        """[chunks, 2] int64: this side's rows [start, stop) in every chunk of the store."""
        starts = np.append(0, self._ends[:-1])[: len(self._ends)]
        return np.stack([starts, self._ends], axis=1)[starts < self._ends]

    def chunk_segments(self) -> np.ndarray:
        """[chunks] int64: the segment of the store that each chunk is of."""
        return self._store.chunk_segments()[np.diff(self._ends, prepend=0) > 0]

    def read(
        self,
        name: str,
        start: SupportsIndex = 0,
        stop: SupportsIndex | None = None,
        checksums: bool = False,
    ) -> np.ndarray:
        """Rows [start, stop) of this side, as ``Store.read``."""
        column = self.column(name)
        begin, end = row_range(start, stop, self.rows, f"{self._split} of {self.path}")
        out = np.empty((end - begin, *column.shape), column.numpy_dtype)
        if not column.shape and len(out) == self.rows:
            self._read_all(name, out, checksums)
        else:
            self.read_ranges(name, [(begin, end)], out, checksums)
        return out

    def _read_all(self, name: str, out: np.ndarray, checksums: bool) -> None:
        """Numbers of this side's rows, without a look at each chunk: several times as fast."""
        at = 0
        for low in range(0, self._store.rows, _STRETCH):
            high = min(low + _STRETCH, self._store.rows)
            found = self._store.read(name, low, high, checksums)[self._mask[low:high]]
            out[at : at + len(found)] = found
            at += len(found)

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        out: np.ndarray,
        checksums: bool = False,
    ) -> int:
        """As ``Store.read_ranges``. Chunks of the store are read from the first to the last of the
        rows in them, many side by side, and what belongs to the other side is left out.
        """
        column, at = self.column(name), 0
        size = self._store.chunk_rows * int(np.prod(column.shape, dtype=np.int64))
        many = max(1, min(_SCRATCH // max(1, size * column.numpy_dtype.itemsize), _CHUNKS))
        pieces = self._pieces(ranges)
        while group := list(itertools.islice(pieces, many)):
            shape = (many * self._store.chunk_rows, *column.shape)
            rows = self._lease.empty(shape, column.numpy_dtype)
            spans, places = _spans(group)
            self._store.read_ranges(name, spans, rows, checksums)
            for where in places:
                target = bits(out[at : at + len(where)])
                np.take(bits(rows), where, axis=0, out=target, mode="clip")
                at += len(where)
        return at

    def _pieces(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Rows of this side -> (chunk, rows of the store), for each chunk that they lie in."""
        for start, stop in ranges:
            while start < stop:
                chunk = int(np.searchsorted(self._ends, start, side="right"))
                end = min(stop, int(self._ends[chunk]))
                before = int(self._ends[chunk - 1]) if chunk else 0
                begin, finish = map(int, self._chunks[chunk])
                inside = np.flatnonzero(self._mask[begin:finish])[start - before : end - before]
                yield chunk, begin + inside
                start = end


def _spans(
    pieces: Sequence[tuple[int, np.ndarray]],
) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Ranges of the store that hold rows, one for chunks that follow each other, and the places of
    the rows of each chunk when the ranges are read one behind the other.
    """
    spans, places, size, last = [], [], 0, -2
    for chunk, rows in pieces:
        low, high = int(rows[0]), int(rows[-1]) + 1
        if chunk == last + 1 and spans and low >= spans[-1][1]:
            size += high - spans[-1][1]
            spans[-1] = spans[-1][0], high
        else:
            size += high - low
            spans.append((low, high))
        places.append(rows + (size - high))
        last = chunk
    return spans, places


def held_out(numbers: np.ndarray) -> np.ndarray:
    """Bool: which documents (or rows), by their numbers, are held out; about 12%, well spread.

    The finaliser of splitmix64: the same on every machine and in every version of numpy.
    """
    found, limit = np.empty(len(numbers), bool), np.uint64(int(HELDOUT_SHARE * 2**64))
    for at in range(0, len(numbers), _BLOCK):  # fresh memory for all at once takes longer
        z = numbers[at : at + _BLOCK].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found[at : at + _BLOCK] = z ^ (z >> np.uint64(31)) < limit
    return found


def _names(store: Store, warn: bool) -> np.ndarray:
    """What is hashed: the document of each row; without one its context; else its number."""
    if DOCUMENT not in store.columns and POSITION in store.columns:
        position = store.read(POSITION).astype(np.int64)
        begins = np.diff(position, prepend=-2) != 1
        if warn:
            _warn_of_shuffled(store, position[begins])
        return np.cumsum(begins)
    if DOCUMENT not in store.columns:
        return np.arange(store.rows)
    column = store.column(DOCUMENT)
    if column.dtype == STRING:  # numbers of strings change when others come
        numbers = [_number(string) for string in store.strings(DOCUMENT)]
        return np.array(numbers, np.uint64)[store.read(DOCUMENT)]
    if column.is_float or column.shape:
        raise StoreError(
            f"column {DOCUMENT!r} of {store.path} has rows of shape {column.shape} and dtype "
            f"{column.dtype}; expected one integer or string a row, by which documents are held out"
        )
    return store.read(DOCUMENT)


def _warn_of_shuffled(store: Store, begins: np.ndarray) -> None:
    """Says where contexts cannot be told apart; `begins` are the positions that runs begin at."""
    elsewhere = int((begins != begins.min(initial=np.iinfo(np.int64).max)).sum())
    if elsewhere > len(begins) * _BROKEN:
        log.warning(
            "%s has positions, but no column %r, and its rows are not in the order of their "
            "contexts: %d of %d runs of positions begin in the middle. Rows of one context fall to "
            "both sides, so held-out rows are not new to the dictionary. Write a column %r (the "
            "number or name of the text that a row is of), or commit without shuffle",
            store.path, DOCUMENT, elsewhere, len(begins), DOCUMENT,
        )  # fmt: skip


def _number(name: str) -> int:
    """64 bits of a string, the same for ever."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
