"""Stores written to object stores: a segment is made in a folder here, sent, and removed.

Nobody can lock a bucket. What decides instead is that a manifest is written only over the one that
this writer read or wrote last (a conditional write), so of two writers one is refused, and nothing
is deleted that anybody could still list.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from saex.data.manifest import Manifest, StoreError
from saex.data.manifest_json import from_json
from saex.data.store_lock import signature
from saex.data.store_names import Names
from saex.data.store_remote import RemotePath
from saex.data.store_resume import check_empty, check_same

# Files of a segment that are sent side by side; each is in memory as a whole.
_SIDE_BY_SIDE = 4


class Outbox:
    """What one writer, of a store or of a part, has to do with an object store.

    Attributes:
      spool: the folder of this machine in which segments are made. What it holds is not needed
        after a kill.
    """

    def __init__(self, to: RemotePath, names: Names):
        """Makes the spool, a folder of this user alone in $TMPDIR.

        Raises:
          StoreError: the spool cannot be made.
        """
        self._to, self._names, self._file = to, names, to / names.manifest
        self.spool = _make_spool(to, names)
        self._stamp = b""  # generation of the manifest that this writer read or wrote last
        self._unsure: list[bytes] = []  # manifests that may have been written: nobody answered
        self._litter = True  # whether unlisted segments of this writer, or one before, may be there

    def start(self, wanted: Manifest) -> Manifest:
        """The manifest to go on from: the one that is there, or `wanted` at a new place.

        Raises:
          StoreError: something else is there, a store of other columns or meta, or the place
            cannot be read or written.
        """
        try:
            data, self._stamp = self._file.read_stamped()
            if data is None:
                found = wanted
                check_empty(self._to)
            else:
                found = from_json(data.decode(errors="replace"), str(self._file))
                check_same(self._to, found, wanted)
            # Not a lock, but a name for messages; and better refused now than after an hour's work.
            (self._to / self._names.lock).write_bytes(signature().encode())
        except OSError as err:
            raise StoreError(f"cannot write a store at {self._to}: {err}") from err
        return found

    def send(self, folder: Path, names: Sequence[str]) -> None:
        """Sends files of a segment. Raises OSError, after several attempts."""

        def send(name: str) -> None:
            (self._to / folder.name / name).write_bytes((folder / name).read_bytes())

        try:
            with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
                list(pool.map(send, names))
        except OSError:
            self._litter = True
            raise

    def publish(self, text: str, listed: Collection[str], new: Collection[str]) -> None:
        """Makes `text` the manifest; removes from the spool what it lists, and litter.

        Args:
          text: of the manifest.
          listed: folders of the segments that it lists.
          new: those among them that the manifest before did not list.

        Raises:
          StoreError: another writer has written a manifest meanwhile.
          OSError: it cannot be written; whether it was is found out at the next attempt.
        """
        data = text.encode()
        try:
            self._stamp = self._put(data)
        except OSError:
            self._unsure.append(data)
            self._litter = True
            raise
        except StoreError:
            self._delete(new)
            raise
        self._unsure.clear()
        for name in new:
            shutil.rmtree(self.spool / name, ignore_errors=True)
        if new and self._litter:
            self._sweep(listed)

    def _put(self, data: bytes) -> bytes:
        """Writes the manifest over this writer's last one; the new generation."""
        stamp = self._file.write_bytes(data, if_equal=self._stamp)
        if stamp:
            return stamp
        there, stamp = self._file.read_stamped()
        if there == data:  # written by an attempt whose answer was lost
            return stamp
        if there in self._unsure and (stamp := self._file.write_bytes(data, if_equal=stamp)):
            return stamp
        raise StoreError(
            f"{self._file} was written by another writer meanwhile, {self._other()}; what it "
            "committed is whole. Stop one of the two and run again: it goes on from there"
        )

    def _other(self) -> str:
        try:
            last = (self._to / self._names.lock).read_text()
        except (OSError, ValueError):
            last = signature()
        return "which is not known" if last == signature() else last

    def _sweep(self, listed: Collection[str]) -> None:
        """Deletes this writer's segments that no manifest lists, nor ever will.

        Called after a new segment was published: the manifest has a content that it never had, so
        whoever opened the store before this cannot publish what is deleted here.
        """
        try:
            there = [p.name for p in self._to.iterdir() if self._names.owns(p.name)]
        except OSError:
            return  # the commit is whole; tried again at the next one
        self._litter = not self._delete([name for name in there if name not in listed])

    def _delete(self, names: Collection[str]) -> bool:
        """Deletes segments that are not listed; whether it could."""
        try:
            self._to.rmtree(names)
        except OSError:
            return False
        return True


def _make_spool(to: RemotePath, names: Names) -> Path:
    """A folder, always the same for a place, so that what a kill left there is found."""
    digest = hashlib.sha256(f"{to.kvstore()} {names.manifest}".encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"saex-{os.getuid()}-{digest[:16]}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError as err:
        raise StoreError(f"cannot make the folder {folder}: {err}. Set TMPDIR") from err
    if not mine:
        raise StoreError(f"{folder} belongs to somebody else: set TMPDIR to a folder of yours")
    return folder
