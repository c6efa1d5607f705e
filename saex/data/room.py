"""Room on the disk: told before the first row is written, and refused where it cannot do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from saex.data.manifest import Column, StoreError, shard_bytes
from saex.data.quantise import with_parts


def bytes_needed(
    columns: Mapping[str, Column], rows: int, segment_rows: int, chunk_rows: int
) -> int:
    """Bytes of the data files of a store of `rows` rows, in segments of `segment_rows` rows.

    Statistics and lists of strings come on top: kilobytes a segment.
    """
    stored = [c for c in with_parts(columns).values() if c.stored]
    full, rest = divmod(rows, segment_rows)
    sizes = [(segment_rows, full), (rest, 1)]
    return sum(n * shard_bytes(c, r, chunk_rows) for c in stored for r, n in sizes if r)


def bytes_left(path: str | os.PathLike, needed: int) -> int:
    """Bytes of a store of `needed` bytes that are not on the disk yet."""
    there = sum(f.stat().st_size for f in Path(path).glob("segment-*/**/*") if f.is_file())
    return max(0, needed - there)


def check_room(path: str | os.PathLike, needed: int, enforce: bool = True, beside: int = 0) -> str:
    """What a store of `needed` bytes takes and what is free, as text for a log.

    Args:
      path: of the store; what is there already counts as written.
      needed: bytes of the whole store.
      enforce: whether too little room is an error.
      beside: bytes that another store will take of the same disk.

    Raises:
      StoreError: it does not fit.
    """
    left, free = bytes_left(path, needed), shutil.disk_usage(_existing(Path(path))).free
    other = f"{beside / 1e9:.3f} GB for the other store, " if beside else ""
    told = f"{needed / 1e9:.3f} GB in all, {left / 1e9:.3f} GB to write, {other}"
    told += f"{free / 1e9:.3f} GB free"
    if enforce and left + beside > free:
        raise StoreError(
            f"the store {path} has no room on its disk: {told}. Make room, give another path, or "
            "take fewer rows or columns (harvest.rows, harvest.heldout_rows, harvest.sites, "
            "harvest.dtype). "
            "harvest.check_room=False (StoreWriter without rows=) begins nevertheless; what is "
            "committed when the disk is full stays whole"
        )
    return told


def check_spool(path: str | os.PathLike, needed: int, enforce: bool = True) -> str:
    """What a segment of a store on an object store takes where it is made, as text for a log.

    Args:
      path: of the store.
      needed: bytes of the segment.
      enforce: whether too little room is an error.

    Raises:
      StoreError: it does not fit.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    told = f"{needed / 1e9:.3f} GB at a time in {folder}, {free / 1e9:.3f} GB free there"
    if enforce and needed > free:
        raise StoreError(
            f"the segments of {path} have no room where they are made: {told}. Set TMPDIR to "
            "another folder, or make them smaller (harvest.segment_rows). "
            "harvest.check_room=False begins nevertheless"
        )
    return told


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())
