"""Which rows are streamed, kept in a file by the hash of the rules, so that a run that goes on, or
another one on the same store, need not look at every row again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saex.data.exclude import Kept, kept_rows
from saex.data.manifest import json_sha256


def resolve_once(
    folder: Path | None, store: Any, rules: Mapping[str, Any], make: Callable[[], Kept]
) -> Kept:
    """What `make()` gives, from a file in `folder` if it was made before.

    Args:
      folder: where files are; None: nothing is kept.
      store: its digest and the rules name the file.
      rules: JSON object.
      make: looks at every row.

    A file that cannot be read, or is not what was written, is made anew; one that cannot be written
    is done without.
    """
    if folder is None:
        return make()
    file = folder / f"rows-{json_sha256({'store': store.digest, 'rules': rules})}.npz"
    found = _load(file, store)
    if found is None:
        found = make()
        _save(file, found)
    return found


def _load(file: Path, store: Any) -> Kept | None:
    try:
        with np.load(file, allow_pickle=False) as saved:
            bits, info, digest = saved["bits"], saved["info"].tobytes(), saved["digest"].tobytes()
        if _digest(bits, info) != digest:
            return None
        mask = np.unpackbits(bits, count=store.rows).view(bool)
        return kept_rows(store.chunks(), mask, json.loads(info))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(file: Path, kept: Kept) -> None:
    if kept.mask is None:
        return  # every row; nothing was looked at
    bits, info = np.packbits(kept.mask), json.dumps(kept.info).encode()
    texts = {"info": info, "digest": _digest(bits, info)}
    arrays = {"bits": bits, **{name: np.frombuffer(t, np.uint8) for name, t in texts.items()}}
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            np.savez(out, allow_pickle=False, **arrays)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest(bits: np.ndarray, info: bytes) -> bytes:
    return hashlib.sha256(bits.tobytes() + info).digest()
