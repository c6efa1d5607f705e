"""The store, read: a folder of row-aligned columns that its manifest vouches for."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from saex.data import quantise, raw
from saex.data import store_shards as shards
from saex.data.manifest import MANIFEST, STRING, Column, Manifest, StoreError
from saex.data.manifest_json import from_json
from saex.data.ranges import row_range
from saex.data.statistics import ColumnStats
from saex.data.store_check import Damage, check, report
from saex.data.store_remote import RemotePath, place
from saex.data.store_strings import StoreStrings


class Store:
    """An open store. Open it with `Store.open(path)`; it holds no lock and never writes.

    What it reads is the manifest of the moment of opening: rows committed later are not seen.
    """

    def __init__(self, path: Path | RemotePath, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._starts = np.cumsum([0, *(s.rows for s in manifest.segments)], dtype=np.int64)
        self._arrays: dict[tuple[int, str], Any] = {}
        self._raw: dict[tuple[int, str], raw.Shard] = {}
        self._strings = StoreStrings(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Store:
        """Opens a store and checks it: manifest, presence and size of files, shard indices.

        `path` may be on an object store (`s3://bucket/name`, `gs://bucket/name`).
        Payload is checked by `verify`, and as it is read where `checksums` is asked for.

        Raises:
          StoreError: no store there, a manifest that is torn, altered or of a newer version, or
            a file that is missing, cut short or has a broken index. Names the file and the mend.
        """
        store = cls(place(path), load_manifest(place(path)))
        damages = check(store, deep=False)
        if damages:
            raise StoreError(report(damages))
        return store

    @property
    def rows(self) -> int:
        """Number of rows in every column."""
        return int(self._starts[-1])

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, the unit that is read and checksummed."""
        return self.manifest.chunk_rows

    @property
    def columns(self) -> dict[str, Column]:
        """Name -> shape and dtype of a row."""
        return self.manifest.columns

    @property
    def meta(self) -> dict[str, Any]:
        """What the producer wrote about itself (a harvest: its whole configuration)."""
        return self.manifest.meta

    @property
    def complete(self) -> bool:
        """Whether the producer said that it was done."""
        return self.manifest.complete

    @property
    def stats(self) -> dict[str, ColumnStats]:
        """Name -> statistics over all rows, position 0 and all."""
        return self.manifest.stats

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of columns, meta and all checksums: the identity of the content."""
        return self.manifest.digest

    def column(self, name: str, width: int | None = None) -> Column:
        """The column `name`.

        Raises:
          StoreError: no such column, or (with `width`) its rows are not vectors of that width.
        """
        if name not in self.columns:
            raise StoreError(f"{self.path} has no column {name!r}; it has {self._described()}")
        column = self.columns[name]
        if width is not None and column.shape != (width,):
            raise StoreError(
                f"column {name!r} of {self.path} has rows of shape {column.shape}; expected width "
                f"{width}. Set the width to the store's, or choose from {self._described()}"
            )
        return column

    def read(
        self,
        name: str,
        start: SupportsIndex = 0,
        stop: SupportsIndex | None = None,
        checksums: bool = False,
    ) -> np.ndarray:
        """Rows [start, stop) of a column, as [stop - start, *shape] in the stored dtype.

        Columns of int8 with scales are float32, strings numbers of `strings(name)`, int32.

        Raises:
          StoreError: no such column, rows outside the store, or a file that is torn, gone or
            changed since the store was opened; with `checksums` also altered payload.
        """
        column = self.column(name)
        begin, end = row_range(start, stop, self.rows, self.path)
        out = np.empty((end - begin, *column.shape), column.numpy_dtype)
        self.read_ranges(name, [(begin, end)], out, checksums)
        return out

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        out: np.ndarray,
        checksums: bool = False,
    ) -> int:
        """Reads [start, stop) ranges one behind the other into `out`; returns the rows read.

        All ranges are read side by side, straight into `out` [>= rows, *shape], contiguous, of
        the dtype that `read` gives.

        Args:
          name: the column.
          ranges: rows.
          out: where they go.
          checksums: whether the CRC of every chunk is checked, which takes about as long again.

        Raises:
          StoreError: as `read`; the file is named with its rows and the mend.
        """
        column, rows = self.columns[name], sum(stop - start for start, stop in ranges)
        if not column.stored:
            arrays = {}
            for part, one in quantise.parts(name, column).items():
                arrays[part] = np.empty((rows, *one.shape), one.numpy_dtype)
                self.read_ranges(part, ranges, arrays[part], checksums)
            quantise.decode(name, column, arrays, out[:rows])
            return rows
        parts, at = [], 0
        first = np.searchsorted(self._starts, [start for start, _ in ranges], side="right") - 1
        for (start, stop), one in zip(ranges, first.tolist()):
            for segment, lo, hi in self._split(start, stop, one):
                parts.append((segment, lo, hi, out[at : at + hi - lo]))
                at += hi - lo
        checked = checksums or isinstance(self.path, RemotePath)
        (self._read_checked if checked else self._read_raw)(name, parts)
        if column.dtype == STRING:
            self._renumber(name, parts)
        return at

    def strings(self, name: str) -> tuple[str, ...]:
        """The strings of a column of strings, sorted by code point: row value i is number i.

        Raises:
          StoreError: no such column, one of numbers, or a file that cannot be read.
        """
        if self.column(name).dtype != STRING:
            raise StoreError(f"column {name!r} of {self.path} is {self.columns[name].dtype}: it "
                             f"has no strings; there are {self._described()}")  # fmt: skip
        return self._strings.of(name)

    def aligned(self, strings: Mapping[str, tuple[str, ...]]) -> Store:
        """This store with the strings of some columns numbered by other lists, sorted, that hold
        at least the store's own; so rows of several stores can be compared.
        """
        other = copy.copy(self)
        other._strings = StoreStrings(self.path, self.manifest, strings)
        return other

    def chunks(self) -> np.ndarray:
        """[chunks, 2] int64: row range [start, stop) of every chunk, the unit that is read fast."""
        size = self.manifest.chunk_rows
        parts = []
        for start, stop in zip(self._starts[:-1], self._starts[1:]):
            begin = np.arange(start, stop, size)
            parts.append(np.stack([begin, np.minimum(begin + size, stop)], axis=1))
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)

    def chunk_segments(self) -> np.ndarray:
        """[chunks] int64: the segment that each chunk is of."""
        return np.searchsorted(self._starts, self.chunks()[:, 0], side="right") - 1

    def damages(self) -> list[Damage]:
        """Reads every byte and compares it with the manifest; every damage, by file and rows."""
        return check(self, deep=True)

    def verify(self) -> None:
        """Reads every byte and compares it with the manifest.

        Raises:
          StoreError: lists every damaged file with the rows that are hurt, and the mend.
        """
        damages = self.damages()
        if damages:
            raise StoreError(report(damages))

    def _described(self) -> str:
        return ", ".join(f"{n} {list(c.shape)} {c.dtype}" for n, c in self.columns.items())

    def folder(self, segment: int) -> Path | RemotePath:
        """Where a segment lies."""
        return self.path / self.manifest.segments[segment].path

    def rows_of(self, segment: int) -> tuple[int, int]:
        """The rows [start, stop) of a segment."""
        return int(self._starts[segment]), int(self._starts[segment + 1])

    def open_shard(self, segment: int, name: str) -> raw.Shard:
        """Opens the data file of a column that is stored, and keeps the index that it has now.

        Raises:
          ValueError: what is wrong with the index.
          OSError: the file cannot be read.
        """
        column, rows = self.columns[name], self.manifest.segments[segment].rows
        file = self.folder(segment) / name / column.shard
        shard = shards.open_raw(file, column, rows, self.manifest.chunk_rows)
        self._raw[segment, name] = shard
        return shard

    def _split(self, start: int, stop: int, segment: int) -> list[tuple[int, int, int]]:
        """Range of the store -> ranges inside segments: (segment, start, stop).

        ``segment``: where it begins.
        """
        parts = []
        while start < stop:
            base, end = int(self._starts[segment]), int(self._starts[segment + 1])
            parts.append((segment, start - base, min(stop, end) - base))
            start, segment = min(stop, end), segment + 1
        return parts

    def _array(self, segment: int, name: str) -> Any:
        key = (segment, name)
        if key not in self._arrays:
            rows, chunk = self.manifest.segments[segment].rows, self.manifest.chunk_rows
            folder = self.folder(segment) / name
            self._arrays[key] = shards.open_array(folder, self.columns[name], rows, chunk)
        return self._arrays[key]

    def _read_checked(self, name: str, parts: list[tuple[int, int, int, np.ndarray]]) -> None:
        """Reads parts of segments through tensorstore, which checks the CRC of each chunk."""
        pending = [
            (segment, lo, hi, shards.start_read(self._array(segment, name), lo, hi, rows))
            for segment, lo, hi, rows in parts
        ]
        for segment, lo, hi, read in pending:
            try:
                read.result()
            except ValueError as err:
                raise self._broken(segment, name, lo, hi, err) from err

    def _renumber(self, name: str, parts: list[tuple[int, int, int, np.ndarray]]) -> None:
        """Turns numbers of the segments' lists of strings into those of the store's."""
        for segment, lo, hi, rows in parts:
            try:
                self._strings.renumber(segment, name, rows)
            except StoreError:
                raise
            except ValueError as err:
                raise self._broken(segment, name, lo, hi, err) from err

    def _read_raw(self, name: str, parts: list[tuple[int, int, int, np.ndarray]]) -> None:
        """Reads parts of segments at the offsets of the shard indices."""
        jobs = [
            (segment, job)
            for segment, lo, hi, rows in parts
            for job in raw.cut(raw.Job(self._shard(segment, name), lo, hi, rows))
        ]
        for (segment, job), err in zip(jobs, raw.run([job for _, job in jobs])):
            if err is not None:
                raise self._broken(segment, name, job.start, job.stop, err) from err

    def _shard(self, segment: int, name: str) -> raw.Shard:
        return self._raw.get((segment, name)) or self.open_shard(segment, name)

    def _broken(self, segment: int, name: str, lo: int, hi: int, err: Exception) -> StoreError:
        folder, base = self.folder(segment), int(self._starts[segment])
        file, reason = folder / name / self.columns[name].shard, shards.brief(err)
        if isinstance(err, OSError):
            reason = (
                "is missing" if isinstance(err, FileNotFoundError) else f"cannot be read: {err}"
            )
        return StoreError(report([Damage(file, folder, reason, ((base + lo, base + hi),))]))


def find_manifest(path: Path | RemotePath) -> Manifest | None:
    """The manifest of the store at `path`; None where there is none. Raises StoreError."""
    file = path / MANIFEST
    try:
        there = file.exists()
    except OSError as err:
        raise StoreError(f"{file} cannot be read: {err}") from err
    return load_manifest(path) if there else None


def load_manifest(path: Path | RemotePath, name: str = MANIFEST) -> Manifest:
    """Reads and checks `manifest.json` (or a part's) of the store at `path`.

    Raises:
      StoreError: there is none, or it is torn, altered or of a newer version.
    """
    file = path / name
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        what = "is not a store: it has no manifest.json" if path.is_dir() else "does not exist"
        raise StoreError(
            f"{path} {what}. Give the folder of a store, or harvest one there."
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        raise StoreError(f"{file} cannot be read: {err}") from err
    return from_json(text, str(file))
