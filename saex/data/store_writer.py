"""The store, written: rows are appended in memory and committed segment by segment.

Nothing is ever half there: a segment is a folder of its own name, and becomes part of the store
only when the manifest that lists it has replaced the one before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saex.data import store_shards as shards
from saex.data.buffer import RowBuffer
from saex.data.durable import replace_synced, sync_folders, write_synced
from saex.data.manifest import (
    STATS,
    STRING,
    STRINGS,
    Column,
    Manifest,
    Segment,
    StoreError,
    segment_files,
)
from saex.data.manifest_json import check_columns, to_json
from saex.data.order import permutation
from saex.data.quantise import decoded_blocks, with_parts
from saex.data.room import bytes_needed, check_room
from saex.data.statistics import ColumnStats, merge_all, stats_from_json, stats_to_json
from saex.data.store_lock import lock_folder
from saex.data.store_names import Names
from saex.data.store_remote import RemotePath, each, place
from saex.data.store_remote_writer import Outbox
from saex.data.store_resume import start_from
from saex.data.strings import to_json as strings_to_json

log = logging.getLogger("saex")


class StoreWriter:
    """Writes a store, or goes on with one that is not complete.

    ```
    with StoreWriter("runs/digits", {"x": Column((64,), "float32")}, {"made from": "digits"}) as w:
        w.append({"x": rows})       # any number of times: arrays of numpy, JAX or torch
        w.commit({"next": 1797})    # from here on these rows survive everything
        w.finish()                  # nothing will follow
    ```

    After a crash open it again with the same columns and meta: `cursor` is what the last commit
    was given, so the producer knows where to go on. One writer at a time owns a folder, or each of
    its parts.

    Attributes:
      cursor: the cursor of the last commit; `{}` in a new store.
      rows: committed rows.
      buffered: appended rows that are not committed yet.
      complete: whether `finish` was called.
      missing: places of segments whose folder is gone (somebody deleted a damaged one);
        write their rows again and `commit(cursor, replace=place)`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        columns: Mapping[str, Column],
        meta: Mapping[str, Any] | None = None,
        *,
        chunk_rows: int = 256,
        max_buffer_bytes: int = 2**31,
        part: tuple[int, int] | None = None,
        non_finite: Literal["refuse", "drop"] = "refuse",
        rows: int | None = None,
    ):
        """Opens the folder for writing and removes what killed attempts left in it.

        Args:
          path: folder of the store, made if it is not there; or a place on an object store
            (`s3://bucket/name`), to which segments are sent from a folder in $TMPDIR, where no
            more than one lies at a time.
          columns: name -> row shape and dtype.
          meta: JSON object that says how the rows are made; it is part of the store's identity.
          chunk_rows: rows per chunk, the unit that is read and checksummed.
          max_buffer_bytes: memory for rows that are not committed; `append` refuses more. A commit
            with `shuffle` takes as much again, and keeps it.
          part: (i, n) to write part i of n of a store. Parts are written by any number of
            processes into one folder without knowing of each other; `merge_parts` makes them one.
          non_finite: what `append` does with rows that hold NaN or infinity: "refuse" all that it
            was given, or "drop" these rows and count them (`dropped`).
          rows: how many rows the store will have, if that is known: where the disk has no room for
            them, nothing is begun. Object stores have room.

        Raises:
          StoreError: columns or meta that the format does not allow, or other ones than the store
            there has; a place that is no store, cannot be written, has another writer, or lies on
            a disk without room for the rows.
        """
        self.path = place(path)
        whole = with_parts(columns)
        check_columns(whole)
        if chunk_rows < 1:
            raise StoreError(f"chunk_rows is {chunk_rows}; expected a whole number from 1")
        if rows is not None and isinstance(self.path, Path):
            check_room(self.path, bytes_needed(columns, rows, max(1, rows), chunk_rows))
        wanted = Manifest(whole, chunk_rows, _as_json(meta or {}, "meta"))
        self._buffer = RowBuffer(dict(columns), max_buffer_bytes, non_finite == "drop")
        self._names = Names(part)
        self._shuffle: tuple[int, ...] | None = None
        remote = self.path if isinstance(self.path, RemotePath) else None
        self._outbox = Outbox(remote, self._names) if remote else None
        # Where segments are made: in the store itself, or in a folder that they are sent from.
        self._work = self._outbox.spool if self._outbox else Path(path)
        self._lock = lock_folder(self._work, self._names.lock, where=self.path)
        try:
            self._manifest = start_from(self._work, wanted, self._names)
            if self._outbox:
                self._manifest = self._outbox.start(wanted)
            segments = self._manifest.segments
            self._parts = each(self.path, self._read_stats, segments)
            self.missing = [i for i, s in enumerate(segments) if not self._is_there(i, s)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.buffered:
            log.warning(
                "%s: %d rows were appended and never committed, so they are not in the store: "
                "call commit(cursor) after append, or finish() at the end",
                self.path, self.buffered,
            )  # fmt: skip
        self.close()

    def close(self) -> None:
        """Lets go of the folder. Rows that were not committed are lost; leaving `with` says so."""
        if self._outbox:
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.close()

    @property
    def cursor(self) -> dict[str, Any]:
        """What the last commit was given; `{}` in a new store."""
        return self._manifest.cursor

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self._manifest.rows

    @property
    def buffered(self) -> int:
        """Rows appended since the last commit."""
        return self._buffer.rows

    @property
    def dropped(self) -> int:
        """Rows that were left out as they held NaN or infinity."""
        return self._manifest.dropped + self._buffer.dropped

    @property
    def complete(self) -> bool:
        """Whether the store is marked complete."""
        return self._manifest.complete

    def span(self, place: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The cursors before and after the segment at `place`: what to make anew if it is lost."""
        segments = self._manifest.segments
        return (segments[place - 1].cursor if place else {}), segments[place].cursor

    def append(self, rows: Mapping[str, Any]) -> None:
        """Takes rows, a copy of them, into memory: `{column: [rows, *shape]}`, equally many each.

        Floating point is rounded to the column's dtype; integers must fit.

        Raises:
          StoreError: a column missing, unknown, of another shape or kind; NaN or infinity (count,
            first row and column are named); or too much that is not committed. Nothing is taken.
        """
        if self.complete and not self.missing:
            raise StoreError(f"{self.path} is complete: nothing can be added to it")
        self._buffer.append(rows, first_row=self.rows + self.buffered)

    def commit(
        self,
        cursor: Mapping[str, Any],
        replace: int | None = None,
        shuffle: tuple[int, ...] | None = None,
    ) -> None:
        """Writes what was appended as one segment and makes it part of the store.

        Args:
          cursor: JSON object, where the producer shall go on.
          replace: place of a lost segment that these rows stand for (see `missing`).
          shuffle: whole numbers from 0 that decide a random order of the rows of the segment; None
            leaves them as they came. A replaced segment needs what it had.

        Raises:
          StoreError: the disk is full or fails, or the object store does not answer. Everything
            committed before is whole, the rows are still in memory, and `commit` may be tried
            again. Or another writer has been at the object store: run again.
        """
        cursor, self._shuffle = _as_json(cursor, "cursor"), shuffle
        if replace is not None:
            return self._commit_in_place(replace)
        manifest, parts = self._dropped_counted(), self._parts
        if self.buffered:
            dropped, place = manifest.dropped_since, len(manifest.segments)
            segment, part = self._write_segment(place, cursor, dropped)
            stats = self._stats_with(part)
            parts = [*parts, part]
            manifest = manifest.with_segment(segment, place, stats=stats, dropped_since=0)
        self._publish(dataclasses.replace(manifest, cursor=cursor), parts)

    def finish(self) -> None:
        """Commits what is left, at the present cursor, and marks the store complete.

        Raises:
          StoreError: as `commit`; or a lost segment was not written anew.
        """
        if self.missing:
            raise StoreError(f"{self.path} lacks the segments {self.missing}: write them first")
        if self.buffered:
            self.commit(self.cursor)
        if not self.complete:
            self._publish(dataclasses.replace(self._dropped_counted(), complete=True), self._parts)

    def _dropped_counted(self) -> Manifest:
        """The manifest with the rows that were dropped since its last segment."""
        manifest = self._manifest
        dropped = manifest.dropped_since + self._buffer.dropped
        return dataclasses.replace(manifest, dropped_since=dropped)

    def _stats_with(self, part: dict[str, ColumnStats]) -> dict[str, ColumnStats]:
        """The statistics of all segments and one more: those of the manifest, added to, which is
        the sum over all segments, in their order, to the bit.
        """
        so_far = self._manifest.stats
        if self.rows and not all(n in so_far and so_far[n].count == self.rows for n in part):
            return merge_all([*self._parts, part])  # whoever wrote this store told less
        return merge_all([so_far, part] if self.rows else [part])

    def _commit_in_place(self, place: int) -> None:
        old = self._manifest.segments[place]
        if place not in self.missing or self.buffered != old.rows:
            raise StoreError(
                f"{self.buffered} rows cannot replace segment {place} of {old.rows} rows; "
                f"lost are the segments {self.missing}"
            )
        segment, part = self._write_segment(place, old.cursor, self._buffer.dropped)
        parts = [*self._parts[:place], part, *self._parts[place + 1 :]]
        known = parts if all(parts) else []
        manifest = self._manifest.with_segment(segment, place)
        if known:
            manifest = dataclasses.replace(manifest, stats=merge_all(known))
        self._publish(manifest, parts)
        self.missing.remove(place)

    def _folder(self, segment: Segment) -> Path | RemotePath:
        return self.path / segment.path

    def _is_there(self, place: int, segment: Segment) -> bool:
        """Whether a segment was not deleted; on object stores, which have no folders, its files."""
        return bool(self._parts[place]) if self._outbox else self._folder(segment).is_dir()

    def _read_stats(self, segment: Segment) -> dict[str, ColumnStats]:
        """A segment's own statistics; {} where its folder is gone."""
        shapes = {n: c.shape for n, c in self._manifest.columns.items()}
        try:
            text = (self._folder(segment) / STATS).read_text()
            return stats_from_json(json.loads(text), shapes)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as err:
            mend = "run again, or if it is damaged " if self._outbox else ""
            raise StoreError(
                f"{self._folder(segment) / STATS} cannot be read ({err}): {mend}delete the folder "
                f"{self._folder(segment)} and run again, which writes that segment anew"
            ) from err

    def _write_segment(
        self, place: int, cursor: dict, dropped: int
    ) -> tuple[Segment, dict[str, ColumnStats]]:
        folder = self._work / self._names.segment(place, secrets.token_hex(6))
        try:
            part = self._write_files(folder)
            names = segment_files(self._manifest.columns)
            files = {name: shards.record(folder / name) for name in names}
            sync_folders(folder)
            if self._outbox:
                self._outbox.send(folder, names)
        except (OSError, ValueError, StoreError) as err:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._failure(err) from err
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Segment(folder.name, self.buffered, cursor, files, dropped), part

    def _write_files(self, folder: Path) -> dict[str, ColumnStats]:
        columns, order = self._manifest.columns, None
        if self._shuffle is not None:
            order = permutation(self.buffered, *self._shuffle)
        rows = self._buffer.view(order)
        chunk = self._manifest.chunk_rows
        strings = {}
        for name in (n for n, c in columns.items() if c.dtype == STRING):
            strings[name], rows[name] = self._buffer.strings(name, rows[name])
        opened = {
            n: shards.open_array(folder / n, columns[n], self.buffered, chunk, create=True)
            for n in rows
        }
        shards.write_arrays([(array, rows[n]) for n, array in opened.items()])
        for name, listed in strings.items():
            write_synced(folder / name / STRINGS, strings_to_json(listed))
        part = {n: self._statistics(n, c, rows) for n, c in columns.items()}
        write_synced(folder / STATS, json.dumps(stats_to_json(part), allow_nan=False))
        return part

    def _statistics(self, name: str, column: Column, rows: dict[str, np.ndarray]) -> ColumnStats:
        """Statistics of a column of the arrays `rows`, as it will be read."""
        if column.stored:
            return ColumnStats.of(rows[name], column.is_float)
        blocks = decoded_blocks(name, column, rows)
        return ColumnStats.of_blocks(blocks, column.shape, self._buffer.clipped[name])

    def _publish(self, manifest: Manifest, parts: list[dict[str, ColumnStats]]) -> None:
        """Makes `manifest` the store's. On failure the store and this writer are as before."""
        new = {s.path for s in manifest.segments} - {s.path for s in self._manifest.segments}
        try:
            if self._outbox:
                self._outbox.publish(to_json(manifest), {s.path for s in manifest.segments}, new)
            else:
                replace_synced(self._work / self._names.manifest, to_json(manifest))
        except (OSError, StoreError) as err:
            for name in new:
                shutil.rmtree(self._work / name, ignore_errors=True)
            raise err if isinstance(err, StoreError) else self._failure(err) from err
        self._manifest, self._parts = manifest, parts
        self._buffer.clear()

    def _failure(self, err: Exception) -> StoreError:
        need = self._buffer.rows * sum(c.row_bytes for c in self._manifest.columns.values())
        free, where = shutil.disk_usage(self._work).free, "there"
        mend = "make room"
        if self._outbox:
            where, mend = f"in {self._work}", "see to the object store, or make room,"
        return StoreError(
            f"could not write {self.buffered} rows to {self.path}: {shards.brief(err)}. "
            f"The segment takes {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free {where}. "
            f"The {self.rows} rows committed before are whole: {mend} and run again, "
            "it goes on from there."
        )


def _as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The value as it will be read back from JSON, so that comparing with a store is fair."""
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as err:
        raise StoreError(f"the {what} of a store must be JSON: {err}") from err
