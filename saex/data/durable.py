"""Files that outlast a power cut: written, synced, and put in place at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TEMPORARY = ".tmp"


def replace_synced(path: Path, text: str) -> None:
    """Puts a new text file in the place of `path` at once: readers see the old or the new one.

    Raises:
      OSError: it could not be written; `path` is as before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        write_synced(temporary, text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)
    except OSError:
        pass  # the file is in place: to report a failure now would have the caller undo it


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until the disk has it. Raises OSError."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folders(folder: Path) -> None:
    """Makes the names in a folder, in those below it and its own durable."""
    folders = [folder.parent, *(Path(root) for root, _, _ in os.walk(folder))]
    # Side by side, so that the file system can put them into one commit of its journal.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync, folders))


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
