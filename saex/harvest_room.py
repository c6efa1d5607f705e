"""What the stores of a harvest take on the disk: told, and checked, before the first row."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from saex.contexts import Contexts
from saex.data import store_remote
from saex.data.manifest import Column
from saex.data.room import bytes_left, bytes_needed, check_room, check_spool
from saex.data.store import find_manifest

if TYPE_CHECKING:
    from saex.harvest import Harvest

log = logging.getLogger("saex")


def tell(
    path: str | os.PathLike,
    columns: Mapping[str, Column],
    cfg: Harvest,
    contexts: Callable[[], Contexts],
    beside: int = 0,
) -> None:
    """Logs what a store takes on the disk; refuses what does not fit.

    Args:
      path, columns, cfg: of the store.
      contexts: what it will be made of, called only if it is not complete.
      beside: bytes that another store will take of the same disk.

    Raises:
      StoreError: it does not fit, alone or with the other one.
    """
    if _complete(path):
        return
    rows = int(contexts().lengths.sum())
    needed = bytes_needed(columns, rows, cfg.segment_rows, cfg.chunk_rows)
    if store_remote.is_remote(path):
        most = min(rows, cfg.segment_rows + cfg.batch * cfg.context)
        told = check_spool(path, bytes_needed(columns, most, most, cfg.chunk_rows), cfg.check_room)
        told = f"{needed / 1e9:.3f} GB in all, {told}"
    else:
        told = check_room(path, needed, enforce=cfg.check_room, beside=beside)
    log.info("%s: %s rows, %s", path, f"{rows:,}", told)


def left(
    path: str | os.PathLike,
    columns: Mapping[str, Column],
    cfg: Harvest,
    contexts: Callable[[], Contexts],
) -> int:
    """Bytes that a store will yet take of the disk; 0 for one that is complete, or not on a disk.

    Args: as `tell`.
    """
    if store_remote.is_remote(path) or _complete(path):
        return 0
    rows = int(contexts().lengths.sum())
    return bytes_left(path, bytes_needed(columns, rows, cfg.segment_rows, cfg.chunk_rows))


def _complete(path: str | os.PathLike) -> bool:
    there = find_manifest(store_remote.place(path))
    return there is not None and there.complete
