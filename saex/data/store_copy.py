"""A store copied, to or from an object store: segments first, the manifest last."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from saex.data.manifest import MANIFEST, StoreError
from saex.data.store import Store
from saex.data.store_remote import RemotePath, place


def copy_store(source: str | os.PathLike, target: str | os.PathLike) -> Store:
    """Copies a store, checks every byte on the way, and opens the copy.

    The copy becomes a store at once, when its manifest is written. One file is in memory at a time.
    A copy that was stopped is begun again by calling this again.

    Args:
      source, target: folders, or places on object stores (`s3://bucket/name`, `gs://bucket/name`).

    Raises:
      StoreError: the source is damaged, something is at the target already, or either cannot be
        reached.
    """
    store, to = Store.open(source), place(target)
    try:
        if (to / MANIFEST).exists():
            raise StoreError(f"{to} is a store already: name another place, or delete it first")
        for segment in store.manifest.segments:
            for name, expected in segment.files.items():
                data = (store.path / segment.path / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != expected.sha256:
                    store.verify()  # says which rows are hurt
                    raise StoreError(f"{store.path / segment.path / name} changes while it is read")
                _write(to / segment.path / name, data)
        _write(to / MANIFEST, (store.path / MANIFEST).read_bytes())
    except OSError as err:
        raise StoreError(f"cannot copy {store.path} to {to}: {err}. Run it again") from err
    return Store.open(target)


def _write(file: Path | RemotePath, data: bytes) -> None:
    """Writes a file and the folders that it is in."""
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
