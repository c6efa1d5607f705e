"""What a store says about itself: columns, segments, files and their checksums."""

from __future__ import annotations

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


class StoreError(ValueError):
    """A store is missing, torn, altered, full, or used wrongly. The message says how to mend it."""


@dataclass(frozen=True)
class Column:
    """One column of a store: what a row of it is.

    Attributes:
      shape: shape of one row; `()` for a number per row, `(d,)` for a vector.
      dtype: one of `DTYPES`; little-endian on disk.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype as numpy knows it (bfloat16 comes from ml_dtypes)."""
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.numpy_dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_float(self) -> bool:
        """Whether values may be NaN and have means."""
        return self.dtype in ("bfloat16", "float32")

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

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(s.rows for s in self.segments)

    @property
    def dropped(self) -> int:
        """Rows that were left out as they held NaN or infinity."""
        return sum(s.dropped for s in self.segments)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: columns, meta, and rows and checksums of all data files.

        Folder names, statistics and the cursor do not enter: two harvests that wrote the same
        rows under the same configuration have the same digest.
        """
        shards = [
            {"rows": s.rows, **{n: s.files[f"{n}/{c.shard}"].sha256 for n, c in self._sorted()}}
            for s in self.segments
        ]
        content = {"columns": columns_to_json(self.columns), "meta": self.meta, "shards": shards}
        return json_sha256(content)

    def _sorted(self) -> list[tuple[str, Column]]:
        return sorted(self.columns.items())

    def with_segment(self, segment: Segment, at: int, **changes: Any) -> Manifest:
        """This manifest with `segment` at place `at` (the end, or in place of another)."""
        segments = (*self.segments[:at], segment, *self.segments[at + 1 :])
        return replace(self, segments=segments, **changes)


def segment_files(columns: Mapping[str, Column]) -> list[str]:
    """Paths of all files of one segment, relative to its folder."""
    names = [f"{name}/{f}" for name, c in columns.items() for f in ("zarr.json", c.shard)]
    return [*names, STATS]


def shard_bytes(column: Column, rows: int, chunk_rows: int) -> int:
    """Size in bytes of a data file: padded chunks with a CRC each, then the index with its CRC."""
    chunks = -(-rows // chunk_rows)
    return chunks * (chunk_rows * column.row_bytes + 4) + 16 * chunks + 4


def columns_to_json(columns: Mapping[str, Column]) -> dict[str, Any]:
    """Columns as they stand in the manifest."""
    return {n: {"shape": list(c.shape), "dtype": c.dtype} for n, c in columns.items()}


def json_sha256(body: Any) -> str:
    """SHA-256 (hex) of a JSON value in its canonical text: sorted keys, no spaces, ASCII."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
