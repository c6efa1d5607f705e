"""One writer at a time: a lock that the system takes back when its process dies."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO

from saex.data.manifest import StoreError

# What file systems without locks answer; there the promise of one writer is the user's.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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
    file.seek(0)
    owner = file.read(200) or "another process"
    file.close()
    return StoreError(f"{path} is being written by {owner}; wait for it, or stop it first")
