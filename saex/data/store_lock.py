"""One writer at a time: a lock that the system takes back when its process dies."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import IO

from saex.data.manifest import StoreError

# What file systems without locks answer; there the promise of one writer is the user's.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Seconds to wait for the signature of a writer that has locked the file and not signed it yet.
_PATIENCE = 2.0


def lock_folder(path: Path, name: str, where: object = None) -> IO[str]:
    """Makes the folder, locks the file `name` in it, and returns the handle that holds the lock.

    Closing the handle, or the death of the process by any means, ends the lock. `where` is the
    place that messages speak of, if that is not the folder.

    Raises:
      StoreError: the folder cannot be written, or another process writes there (it is named).
    """
    import fcntl

    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / name, "a+", encoding="utf-8")
    except OSError as err:
        raise StoreError(f"cannot write a store at {path}: {err}. Give another path.") from err
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno not in _NO_LOCKS:
            raise _taken(where or path, file) from err
    try:
        _sign(file)
    except OSError:
        pass  # a full disk: the signature is only for the message to another writer
    return file


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(signature())
    file.flush()


def signature() -> str:
    """Who this is, for the message to another writer."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _taken(path: object, file: IO[str]) -> StoreError:
    with file:
        owner = _signed(file) or "another process"
    return StoreError(f"{path} is being written by {owner}; wait for it, or stop it first")


def _signed(file: IO[str]) -> str:
    """The signature in the file; empty if none comes, as when its writer's disk is full."""
    give_up = time.monotonic() + _PATIENCE
    while True:
        file.seek(0)
        if (text := file.read(200)) or time.monotonic() > give_up:
            return text
        time.sleep(0.01)
