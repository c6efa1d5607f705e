"""One data file of a store: a zarr3 array in one shard."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saex.data.manifest import Column, FileRecord, StoreError, shard_bytes
from saex.data.raw import Shard, stamp
from saex.data.store_remote import RemotePath

_CRC = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def open_array(
    folder: Path | RemotePath, column: Column, rows: int, chunk_rows: int, create: bool = False
) -> Any:
    """Opens (or creates) the array of one column of one segment.

    The whole metadata is given, so a `zarr.json` that says anything else is refused.

    Raises:
      StoreError: the array is not what the manifest says, or cannot be created.
    """
    import tensorstore as ts

    try:
        spec = _spec(folder, column, rows, chunk_rows)
        return ts.open(spec, create=create, open=not create).result()
    except ValueError as err:
        raise StoreError(f"{folder} is not the array of the manifest: {brief(err)}") from err


def write_arrays(arrays: Sequence[tuple[Any, np.ndarray]]) -> None:
    """Writes whole arrays side by side and waits. Raises ValueError (tensorstore's) on failure.

    The arrays must not be used again afterwards: they may still refer to the memory of `rows`.
    """
    # One write per array: the shard is encoded once, not read and written again per chunk. From
    # the rows where they lie: a copy would guard against changes alone, and there are none.
    write = {"can_reference_source_data_indefinitely": True}
    pending = [array.write(rows, **write) for array, rows in arrays]
    for one in pending:  # none is under way any more when the first failure is raised
        one.exception()
    for one in pending:
        one.result()


def start_read(array: Any, start: int, stop: int, out: np.ndarray) -> Any:
    """Starts reading rows [start, stop) into `out` [stop - start, *shape]; `.result()` waits."""
    import tensorstore as ts

    return ts.array(out).write(array[start:stop])


def brief(err: Exception) -> str:
    """Tensorstore's message without the specification that it appends."""
    return str(err).split(" [tensorstore_spec=")[0]


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def open_raw(path: Path | RemotePath, column: Column, rows: int, chunk_rows: int) -> Shard:
    """Reads the index at the end of a data file; its payload is not looked at.

    Raises:
      ValueError: what is wrong with the index.
      OSError: the file cannot be read.
    """
    chunks = -(-rows // chunk_rows)
    total = shard_bytes(column, rows, chunk_rows)
    if isinstance(path, RemotePath):
        tail, seen = path.read_bytes(total - 16 * chunks - 4, total), (total, 0, 0)
    else:
        with open(path, "rb") as file:
            file.seek(-(16 * chunks + 4), os.SEEK_END)
            tail = file.read()
            seen = stamp(os.fstat(file.fileno()))
    if crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise ValueError("the checksum of its index does not match")
    size = chunk_rows * column.row_bytes + _CRC_BYTES
    end = total - len(tail)
    index = np.frombuffer(tail[:-4], "<u8").reshape(chunks, 2)
    bad = (index[:, 1] != size) | (index[:, 0] > np.uint64(end - size))
    if bad.any():
        raise ValueError(f"its index misplaces chunk {int(bad.argmax())}")
    return Shard(path, index[:, 0].astype(np.int64), chunk_rows, column.row_bytes, seen)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of a few kilobytes, for shard indices: pieces side by side.

    The state after bytes is linear in the state before and in the bytes. So each piece begins at 0,
    the first at -1, and the state before a piece is taken over it as if it were zeros.
    """
    size = len(data) // _PIECES
    crc, rest = 0xFFFFFFFF, data
    if size >= 8:
        rest = data[size * _PIECES :]
        pieces = np.frombuffer(data, np.uint8, size * _PIECES).reshape(_PIECES, size)
        # 32 more that are zeros, and begin with one bit each, say what zeros make of a state.
        columns = np.pad(pieces, ((0, 32), (0, 0))).T.astype(np.uint32)
        states = np.zeros(_PIECES + 32, np.uint32)
        states[0], states[_PIECES:] = 0xFFFFFFFF, 1 << np.arange(32, dtype=np.uint32)
        for column in columns:
            states = (states >> 8) ^ _CRC_STEPS[(states ^ column) & 0xFF]
        over = states[_PIECES:].tolist()
        crc = 0
        for state in states[:_PIECES].tolist():
            for bit in over:
                if crc & 1:
                    state ^= bit
                crc >>= 1
            crc = state
    for byte in rest:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


_CRC_BYTES = 4
_PIECES = 256


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(c >> 1) ^ (0x82F63B78 if c & 1 else 0) for c in table]
    return table


_CRC_TABLE = _crc_table()
_CRC_STEPS = np.array(_CRC_TABLE, np.uint32)


def _spec(folder: Path | RemotePath, column: Column, rows: int, chunk_rows: int) -> dict[str, Any]:
    shard_rows = -(-rows // chunk_rows) * chunk_rows
    shape = list(column.shape)
    kvstore = {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
    if isinstance(folder, RemotePath):
        kvstore = folder.kvstore()
    sharding = {
        "chunk_shape": [chunk_rows, *shape],
        "codecs": [_BYTES, _CRC],
        "index_codecs": [_BYTES, _CRC],
        "index_location": "end",
    }
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {
            "shape": [rows, *shape],
            "data_type": column.numpy_dtype.name,
            "fill_value": 0,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [shard_rows, *shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Without these two a chunk of zeros is left out, and a lost file reads as zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
