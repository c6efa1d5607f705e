"""Parts into one store: what writers made side by side becomes whole by one new manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from saex.data.durable import replace_synced
from saex.data.manifest import MANIFEST, Column, Manifest, StoreError
from saex.data.manifest_json import to_json
from saex.data.statistics import merge_all
from saex.data.store import Store, load_manifest
from saex.data.store_lock import lock_folder
from saex.data.store_names import Names, part_of
from saex.data.store_remote import RemotePath, place


def merge_parts(path: str | os.PathLike) -> Store:
    """Makes the parts in a folder one store, in the order of their numbers; nothing is copied.

    The manifests of the parts stay, so it may be called again, also after a kill, and a writer of
    a part that starts again sees that it is done.

    Raises:
      StoreError: no part there, one that is missing, not complete, damaged, or of another make
        than the others; another writer in the folder.
    """
    folder = place(path)
    if isinstance(folder, RemotePath):
        _merge_remote(folder)
        return Store.open(folder)
    lock = lock_folder(folder, Names().lock)
    try:
        if not (folder / MANIFEST).exists():
            manifest = concatenate(_parts(folder), str(folder))
            replace_synced(folder / MANIFEST, to_json(manifest))
    finally:
        lock.close()
    return Store.open(folder)


def columns_there(path: Path | RemotePath) -> dict[str, Column] | None:
    """The columns of the store at a path, or of one of its parts; None where there is neither.

    Raises:
      StoreError: a manifest that is torn or altered.
    """
    with _reached(path):
        names = [p.name for p in path.iterdir()] if path.is_dir() else []
    parts = sorted(name for name in names if part_of(name) is not None)
    found = [MANIFEST] if MANIFEST in names else parts[:1]
    return load_manifest(path, found[0]).columns if found else None


def _merge_remote(folder: RemotePath) -> None:
    """Writes the manifest if there is none; of two who do so at once one writes, without a lock."""
    with _reached(folder):
        data, absent = (folder / MANIFEST).read_stamped()
        if data is None:
            manifest = concatenate(_parts(folder), str(folder))
            (folder / MANIFEST).write_bytes(to_json(manifest).encode(), if_equal=absent)


@contextmanager
def _reached(place: Path | RemotePath) -> Iterator[None]:
    """Raises StoreError, and says where, if the place does not answer."""
    try:
        yield
    except OSError as err:
        raise StoreError(f"{place} cannot be read or written: {err}. Run it again") from err


def concatenate(manifests: dict[str, Manifest], where: str) -> Manifest:
    """The manifest of the stores' rows one behind the other.

    Args:
      manifests: name -> manifest, in order; at least one.
      where: the place, for messages.

    Raises:
      StoreError: they are not complete, or differ in columns, chunk_rows or meta.
    """
    (first, base), *_ = manifests.items()
    for name, manifest in manifests.items():
        if not manifest.complete:
            raise StoreError(
                f"{name} of {where} is not complete ({manifest.rows} rows so far): run its writer "
                "again, it goes on where it stopped"
            )
        for field in ("columns", "chunk_rows", "meta"):
            if getattr(manifest, field) != getattr(base, field):
                raise StoreError(
                    f"{name} and {first} of {where} differ in {field}: {getattr(manifest, field)} "
                    f"and {getattr(base, field)}. Only what is made alike becomes one store"
                )
    return replace(
        base,
        segments=tuple(s for m in manifests.values() for s in m.segments),
        cursor=next(reversed(manifests.values())).cursor,
        stats=merge_all([m.stats for m in manifests.values() if m.stats]),
        dropped_since=sum(m.dropped_since for m in manifests.values()),
    )


def _parts(folder: Path | RemotePath) -> dict[str, Manifest]:
    """The manifests of all parts of a folder, by name, in order."""
    files = [p.name for p in folder.iterdir()]
    names = {part: n for n in files if (part := part_of(n)) is not None}
    if not names:
        raise StoreError(
            f"{folder} has neither a {MANIFEST} nor parts (manifest.0ofN.json): nothing to merge"
        )
    counts = {count for _, count in names}
    if len(counts) > 1:
        raise StoreError(f"{folder} has parts of different numbers of parts: {sorted(names)}")
    missing = [i for i in range(counts.copy().pop()) if i not in {number for number, _ in names}]
    if missing:
        raise StoreError(
            f"{folder} lacks the parts {missing[:20]} of {counts.pop()}: run their writers first"
        )
    return {name: load_manifest(folder, name) for _, name in sorted(names.items())}
