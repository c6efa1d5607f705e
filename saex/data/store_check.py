"""What is wrong with the files of a store: at a glance when it is opened, in full on request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saex.data import store_shards as shards
from saex.data.manifest import FileRecord, StoreError
from saex.data.store_remote import RemotePath, each

if TYPE_CHECKING:
    from saex.data.store import Store


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written.

    Attributes:
      file: its path.
      segment: the folder of the segment it is in.
      reason: what is wrong.
      rows: the rows of the store that are hurt, as [start, stop) ranges.
    """

    file: Path | RemotePath
    segment: Path | RemotePath
    reason: str
    rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        rows = ", ".join(f"{a} to {b - 1}" for a, b in self.rows)
        return f"{self.file}: {self.reason}; hurt: {f'rows {rows}' if rows else 'no rows'}"


def check(store: Store, deep: bool) -> list[Damage]:
    """Every damage, by file and rows.

    Args:
      store: an open store, or one that is being opened.
      deep: whether every byte is read and compared with the manifest; else presence, sizes, small
        files and the indices of shards are looked at.
    """
    files = [(i, name) for i, s in enumerate(store.manifest.segments) for name in s.files]
    if deep:  # one file at a time: data files are large
        found = [_check(store, file, deep) for file in files]
    else:
        found = each(store.path, lambda file: _check(store, file, deep), files)
    return [damage for damage in found if damage is not None]


def report(damages: Sequence[Damage]) -> str:
    """The damages and the mend, as text."""
    folders = sorted({str(d.segment) for d in damages})
    lines = [f"  {d}" for d in damages[:20]]
    if len(damages) > 20:
        lines.append(f"  and {len(damages) - 20} more")
    return "\n".join(
        [
            "the store is damaged:",
            *lines,
            "To mend it, delete these folders and run the same harvest again, which writes them "
            "anew and keeps the rest:",
            *(f"  {f}" for f in folders[:20]),
        ]
    )


def _check(store: Store, which: tuple[int, str], deep: bool) -> Damage | None:
    """What is wrong with a file, by its segment and path in there; None if nothing is."""
    segment, file = which
    folder, name = store.folder(segment), _column_of(store, file)
    expected = store.manifest.segments[segment].files[file]
    reason = _file_error(folder / file, expected, deep or name is None)
    if reason is None and name is not None:
        reason = _index_error(store, segment, name)
    if reason is None:
        return None
    return Damage(folder / file, folder, reason, _hurt_rows(store, segment, name, deep))


def _column_of(store: Store, file: str) -> str | None:
    """The column whose data file this is; None for the small files."""
    name = file.split("/")[0]
    column = store.columns.get(name)
    return name if column is not None and file == f"{name}/{column.shard}" else None


def _file_error(path: Path | RemotePath, expected: FileRecord, deep: bool) -> str | None:
    """What is wrong with a file by size and, if `deep`, by checksum; None if nothing is."""
    try:
        if isinstance(path, RemotePath):  # without `deep` its index is read at once, and tells
            altered = deep and hashlib.sha256(path.read_bytes()).hexdigest() != expected.sha256
            return "does not match its checksum (altered)" if altered else None
        size = path.stat().st_size
        if size != expected.bytes:
            return f"has {size} bytes; {expected.bytes} were written (torn or cut short)"
        if deep and shards.record(path).sha256 != expected.sha256:
            return "does not match its checksum (altered)"
    except FileNotFoundError:
        return "is missing"
    except OSError as err:
        return f"cannot be read: {err}"
    return None


def _index_error(store: Store, segment: int, name: str) -> str | None:
    try:
        store.open_shard(segment, name)
    except FileNotFoundError:
        return "is missing"
    except OSError as err:
        return f"cannot be read: {err}"
    except ValueError as err:
        return str(err)
    return None


def _hurt_rows(store: Store, segment: int, name: str | None, deep: bool) -> tuple:
    """Rows whose chunks cannot be read; all of the segment's where that was not tried, or where
    every chunk can be: then the file is whole, but it is another one.
    """
    begin, end = store.rows_of(segment)
    if name is None or not deep:
        return ((begin, end),)
    step = store.chunk_rows
    ranges = [(a, min(a + step, end)) for a in range(begin, end, step)]
    return tuple(r for r in ranges if not _readable(store, name, r)) or ((begin, end),)


def _readable(store: Store, name: str, rows: tuple[int, int]) -> bool:
    try:
        store.read(name, *rows, checksums=True)
    except StoreError:
        return False
    return True
