"""What a store says about itself: columns, segments, files and their checksums."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from saex.data.statistics import ColumnStats

MANIFEST = "manifest.json"
STATS = "stats.json"
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: np.dtype(name) for name in ("float32", "int8", "uint8", "int16", "int32", "int64")},
}
# Strings lie on disk as numbers, each the place of a string in a list of the segment's.
STRING, STRINGS = "string", "strings.json"


class StoreError(ValueError):
    """A store is missing, torn, altered, full, or used wrongly. The message says how to mend it."""


@dataclass(frozen=True)
class Column:
    """One column of a store: what a row of it is.

    Attributes:
      shape: shape of one row; `()` for a number per row, `(d,)` for a vector.
      dtype: one of `DTYPES`, little-endian on disk; or "string".
      scales: of int8 that stands for floating point, the step of each channel (of the last axis);
        `saex.data.calibrate` finds them. None: numbers are what they are.
      outliers: channels of such a column that are kept in bfloat16.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    scales: tuple[float, ...] | None = None
    outliers: tuple[int, ...] = ()

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of rows as they are read (bfloat16 comes from ml_dtypes): float32 where there
        are scales, int32 for strings, which are read as numbers.
        """
        if self.dtype == STRING:
            return np.dtype(np.int32)
        return DTYPES[self.dtype if self.scales is None else "float32"]

    @property
    def stored(self) -> bool:
        """Whether the column has an array of its own. One with scales is made of two others."""
        return self.scales is None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the column's own array; 0 where it has none."""
        size = self.numpy_dtype.itemsize if self.stored else 0
        return size * int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_float(self) -> bool:
        """Whether values may be NaN and have means."""
        return self.numpy_dtype.name in ("bfloat16", "float32")

    @functools.cached_property
    def scale_array(self) -> np.ndarray:
        """[channels] float32, the scales."""
        return np.array(self.scales, np.float32)

    @property
    def shard(self) -> str:
        """Path of the one data file inside the column's folder: `c/0` or `c/0/0` and so on."""
        return "/".join(["c"] + ["0"] * (1 + len(self.shape)))


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Segment:
    """One committed folder of rows.

    Attributes:
      path: folder name inside the store.
      rows: rows in every column of it.
      cursor: where its producer stood after it.
      files: path inside the folder -> size and checksum; every file of the segment.
      dropped: rows that its producer gave and that were left out, as they held NaN or infinity.
    """

    path: str
    rows: int
    cursor: dict[str, Any]
    files: dict[str, FileRecord]
    dropped: int = 0


@dataclass(frozen=True)
class Manifest:
    """All that a store says about itself. Immutable: a commit makes a new one."""

    columns: dict[str, Column]
    chunk_rows: int
    meta: dict[str, Any] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    cursor: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    stats: dict[str, ColumnStats] = field(default_factory=dict)
    # Rows left out since the last segment: no segment's own count can have them yet.
    dropped_since: int = 0

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(s.rows for s in self.segments)

    @property
    def dropped(self) -> int:
        """Rows that were left out as they held NaN or infinity."""
        return sum(s.dropped for s in self.segments) + self.dropped_since

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: columns, meta, and rows and checksums of all data files.

        Folder names, statistics and the cursor do not enter: two harvests that wrote the same
        rows under the same configuration have the same digest.
        """
        data = {n: f"{n}/{c.shard}" for n, c in self.columns.items() if c.stored}
        data |= {f: f for f in string_files(self.columns)}
        shards = [
            {"rows": s.rows, **{n: s.files[file].sha256 for n, file in data.items()}}
            for s in self.segments
        ]
        content = {"columns": columns_to_json(self.columns), "meta": self.meta, "shards": shards}
        return json_sha256(content)

    def with_segment(self, segment: Segment, at: int, **changes: Any) -> Manifest:
        """This manifest with `segment` at place `at` (the end, or in place of another)."""
        segments = (*self.segments[:at], segment, *self.segments[at + 1 :])
        return replace(self, segments=segments, **changes)


def segment_files(columns: Mapping[str, Column]) -> list[str]:
    """Paths of all files of one segment, relative to its folder."""
    stored = [(name, column) for name, column in columns.items() if column.stored]
    names = [f"{name}/{f}" for name, c in stored for f in ("zarr.json", c.shard)]
    return [*names, *string_files(columns), STATS]


def string_files(columns: Mapping[str, Column]) -> list[str]:
    """Paths of a segment's lists of strings, relative to its folder."""
    return [f"{name}/{STRINGS}" for name, c in columns.items() if c.dtype == STRING]


def shard_bytes(column: Column, rows: int, chunk_rows: int) -> int:
    """Size in bytes of a data file: padded chunks with a CRC each, then the index with its CRC."""
    chunks = -(-rows // chunk_rows)
    return chunks * (chunk_rows * column.row_bytes + 4) + 16 * chunks + 4


def columns_to_json(columns: Mapping[str, Column]) -> dict[str, Any]:
    """Columns as they stand in the manifest."""
    found = {}
    for name, column in columns.items():
        found[name] = {"shape": list(column.shape), "dtype": column.dtype}
        if column.scales is not None:
            more = {"scales": list(column.scales), "outliers": list(column.outliers)}
            found[name] |= more
    return found


def json_sha256(body: Any) -> str:
    """SHA-256 (hex) of a JSON value in its canonical text: sorted keys, no spaces, ASCII."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
