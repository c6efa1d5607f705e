"""Going on with a folder: whose store it is, and what killed attempts left in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from saex.data.durable import TEMPORARY
from saex.data.manifest import Manifest, StoreError
from saex.data.store import load_manifest
from saex.data.store_names import Names, is_ours
from saex.data.store_remote import RemotePath


def start_from(path: Path, wanted: Manifest, names: Names) -> Manifest:
    """The manifest to go on from: the one that is there, or `wanted` in a new folder.

    Removes what killed attempts under these names left; the caller holds their lock.

    Raises:
      StoreError: the folder holds something else, or a store of other columns or meta.
    """
    found = wanted
    if (path / names.manifest).exists():
        found = load_manifest(path, names.manifest)
        check_same(path, found, wanted)
    else:
        check_empty(path)
    kept = {s.path for s in found.segments}
    for entry in path.iterdir():
        if names.owns(entry.name) and entry.name not in kept:
            shutil.rmtree(entry)
        elif entry.name == names.manifest + TEMPORARY:
            entry.unlink()
    return found


def check_empty(path: Path | RemotePath) -> None:
    """Raises StoreError where there is anything that no writer of stores gave its name."""
    if any(not is_ours(p.name) for p in path.iterdir()):
        raise StoreError(f"{path} is not empty and not a store; give a new or an empty folder")


def check_same(path: Path | RemotePath, found: Manifest, wanted: Manifest) -> None:
    """Raises StoreError where the store at `path` is of other columns or meta than `wanted`."""
    there = {"columns": found.columns, "chunk_rows": found.chunk_rows, **found.meta}
    here = {"columns": wanted.columns, "chunk_rows": wanted.chunk_rows, **wanted.meta}
    differ = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    if differ:
        lines = [f"  {k}: {there.get(k)!r:.200} there, {here.get(k)!r:.200} now" for k in differ]
        raise StoreError(
            f"{path} holds a store of another configuration:\n"
            + "\n".join(lines)
            + "\nGive another path, or delete that folder if it is not needed."
        )
