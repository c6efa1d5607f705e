"""A store copied, to or from an object store: segments first, the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from saex.data.durable import replace_synced, sync_folders
from saex.data.manifest import MANIFEST, StoreError
from saex.data.manifest_json import from_json
from saex.data.store import Store
from saex.data.store_lock import lock_folder
from saex.data.store_names import Names
from saex.data.store_remote import RemotePath, place


def copy_store(source: str | os.PathLike, target: str | os.PathLike) -> Store:
    """Copies a store, checks every byte on the way, and opens the copy.

    The copy becomes a store at once, when its manifest is written. One file is in memory at a time.
    A copy that was stopped is begun again by calling this again. Of two copies to one place, or a
    copy and a writer, one is refused.

    Args:
      source, target: folders, or places on object stores (`s3://bucket/name`, `gs://bucket/name`).

    Raises:
      StoreError: the source is damaged, or is written meanwhile; something is at the target
        already, or writes there; or either cannot be reached.
    """
    store, to = Store.open(source), place(target)
    # A folder is locked as by a writer; nobody can lock a bucket, where the manifest decides.
    lock = lock_folder(to, Names().lock) if isinstance(to, Path) else contextlib.nullcontext()
    try:
        with lock:
            _copy(store, to)
    except OSError as err:
        raise StoreError(f"cannot copy {store.path} to {to}: {err}. Run it again") from err
    return Store.open(target)


def _copy(store: Store, to: Path | RemotePath) -> None:
    manifest = _manifest(store)
    if (to / MANIFEST).exists():
        raise StoreError(f"{to} is a store already: name another place, or delete it first")
    for segment in store.manifest.segments:
        for name, expected in segment.files.items():
            data = (store.path / segment.path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != expected.sha256:
                store.verify()  # says which rows are hurt
                raise StoreError(f"{store.path / segment.path / name} changes while it is read")
            _write(to / segment.path / name, data)
        if isinstance(to, Path):
            sync_folders(to / segment.path)
    _publish(to / MANIFEST, manifest)


def _manifest(store: Store) -> bytes:
    """The bytes of the manifest that the store was opened with."""
    data = (store.path / MANIFEST).read_bytes()
    if from_json(data.decode(), str(store.path / MANIFEST)).segments != store.manifest.segments:
        raise StoreError(f"{store.path} is being written: copy it when its writer has stopped")
    return data


def _write(file: Path | RemotePath, data: bytes) -> None:
    """Writes a file and the folders that it is in, and waits until the disk has it."""
    if isinstance(file, RemotePath):
        file.write_bytes(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _publish(file: Path | RemotePath, data: bytes) -> None:
    """Puts a manifest where there is none, whole or not at all."""
    if isinstance(file, Path):
        return replace_synced(file, data.decode())
    found, absent = file.read_stamped()
    if found is None and file.write_bytes(data, if_equal=absent):
        return
    # What is there is ours if the answer to an attempt was lost and the next one was refused.
    if file.read_bytes() != data:
        raise StoreError(f"{file} was written by somebody else meanwhile; its store is whole")
