"""The manifest as JSON: written, and parsed and checked in full before anything is allocated.

`docs/store-format.md` is the normative description of what is read and written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from saex.data.manifest import (
    DTYPES,
    STRING,
    Column,
    FileRecord,
    Manifest,
    Segment,
    StoreError,
    columns_to_json,
    json_sha256,
    segment_files,
    shard_bytes,
)
from saex.data.quantise import parts
from saex.data.statistics import stats_from_json, stats_to_json

FORMAT = "saex-store"
# Stores whose columns an older reader would not misread are of version 1, as they always were.
VERSION = 2
_AGAIN = "Take a copy that is whole, or delete the store's folder and write it anew."
# A name is also a folder name, so it holds nothing that a file system or a path could misread.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_SEGMENT = re.compile(r"segment-[A-Za-z0-9\-]{1,80}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {
    "format", "version", "complete", "rows", "dropped", "chunk_rows", "columns", "meta", "cursor",
    "segments", "stats",
}  # fmt: skip


def to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`, its own checksum included."""
    body = {
        "format": FORMAT,
        "version": version_of(manifest.columns),
        "complete": manifest.complete,
        "rows": manifest.rows,
        **({"dropped": manifest.dropped_since} if manifest.dropped_since else {}),
        "chunk_rows": manifest.chunk_rows,
        "columns": columns_to_json(manifest.columns),
        "meta": manifest.meta,
        "cursor": manifest.cursor,
        "segments": [
            {
                "path": s.path,
                "rows": s.rows,
                "cursor": s.cursor,
                **({"dropped": s.dropped} if s.dropped else {}),
                "files": {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in s.files.items()},
            }
            for s in manifest.segments
        ],
        "stats": stats_to_json(manifest.stats),
    }
    return json.dumps({**body, "checksum": json_sha256(body)}, indent=1, allow_nan=False) + "\n"


def from_json(text: str, where: str) -> Manifest:
    """Parses and checks the text of a manifest.

    Args:
      text: content of `manifest.json`.
      where: its path, for messages.

    Raises:
      StoreError: not JSON, another format, a newer version, altered, or inconsistent; the
        message names the field.
    """
    try:
        body = json.loads(text)
    except ValueError as err:
        raise StoreError(
            f"{where} is not JSON ({err}): it was cut short or altered. {_AGAIN}"
        ) from err
    _check_version(body, where)
    _check_checksum(body, where)
    columns = parse_columns(_get(body, "columns", dict, where), where)
    if body["version"] < version_of(columns):
        raise StoreError(f"{where}: version 1 has no strings and no scales. {_AGAIN}")
    chunk_rows = _positive(body, "chunk_rows", where)
    segments = tuple(
        _segment(s, columns, chunk_rows, f"{where}: segments[{i}]")
        for i, s in enumerate(_get(body, "segments", list, where))
    )
    stats = _stats(_get(body, "stats", dict, where), columns, where)
    manifest = Manifest(
        columns=columns,
        chunk_rows=chunk_rows,
        meta=_get(body, "meta", dict, where),
        segments=segments,
        cursor=_get(body, "cursor", dict, where),
        complete=_get(body, "complete", bool, where),
        stats=stats,
        dropped_since=_dropped(body, where),
    )
    if body.get("rows") != manifest.rows:
        raise StoreError(f"{where}: rows is {body.get('rows')!r}, not {manifest.rows}. {_AGAIN}")
    return manifest


def version_of(columns: Mapping[str, Column]) -> int:
    """The version of the format that a store of these columns needs."""
    new = any(c.dtype == STRING or c.scales is not None for c in columns.values())
    return 2 if new else 1


def parse_columns(raw: Mapping[str, Any], where: str) -> dict[str, Column]:
    """Checks `{name: {"shape": [...], "dtype": ...}}` and returns the columns.

    Raises:
      StoreError: a name, shape, dtype, scale or outlier that the format does not allow, or an int8
        column with scales whose parts are not there.
    """
    found = {name: _column(name, c, f"{where}: columns[{name!r}]") for name, c in raw.items()}
    for name, column in found.items():
        for part, needed in parts(name, column).items():
            if found.get(part) != needed:
                raise StoreError(
                    f"{where}: columns[{name!r}] needs {part!r} of shape {list(needed.shape)} and "
                    f"dtype {needed.dtype}"
                )
    return found


def check_columns(columns: Mapping[str, Column]) -> None:
    """Refuses columns that the format does not allow.

    Raises:
      StoreError: no column at all, or a name, shape or dtype that is not allowed.
    """
    if not columns:
        raise StoreError("a store needs at least one column")
    parse_columns(columns_to_json(columns), "the columns of a new store")
    if len({n.lower() for n in columns}) < len(columns):
        raise StoreError(f"column names differ in case only: {sorted(columns)}; rename one")


def _check_version(body: Any, where: str) -> None:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StoreError(f'{where} is not the manifest of a store: "format" must be "{FORMAT}"')
    version = body.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"{where}: version is {version!r}; expected a whole number from 1")
    if version > VERSION:
        raise StoreError(
            f"{where} has version {version}; this saex reads versions up to {VERSION}. "
            "The store was written by a newer saex: upgrade saex to read it."
        )


def _check_checksum(body: dict[str, Any], where: str) -> None:
    rest = {k: v for k, v in body.items() if k != "checksum"}
    unknown = sorted(set(rest) - _KEYS)
    if "checksum" not in body and unknown:  # this may be what is left of it
        raise StoreError(
            f"{where} has no checksum, but {unknown[0]!r:.80}, which version {VERSION} does not "
            f"know: it was altered. {_AGAIN}"
        )
    if "checksum" in body and body["checksum"] != json_sha256(rest):
        raise StoreError(f"{where} does not match its own checksum: it was altered. {_AGAIN}")


def _get(obj: Any, key: str, kind: type, where: str) -> Any:
    value = obj.get(key) if isinstance(obj, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise StoreError(f"{where}: {key} is {value!r:.80}; expected {kind.__name__}. {_AGAIN}")
    return value


def _positive(obj: Any, key: str, where: str) -> int:
    value = _get(obj, key, int, where)
    if not 1 <= value < 2**62:
        raise StoreError(f"{where}: {key} is {value}; expected a whole number from 1. {_AGAIN}")
    return value


def _column(name: str, raw: Any, where: str) -> Column:
    if not _NAME.fullmatch(name):
        raise StoreError(f"{where}: a column name has letters, digits, '_', '-' and '.' only")
    shape, dtype = _get(raw, "shape", list, where), _get(raw, "dtype", str, where)
    if dtype not in (*DTYPES, STRING):
        raise StoreError(
            f"{where}: dtype is {dtype!r}; a store holds {', '.join(DTYPES)}, {STRING}"
        )
    if len(shape) > 8 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise StoreError(f"{where}: shape is {shape!r:.80}; expected up to 8 positive sizes")
    if dtype == STRING and shape:
        raise StoreError(f"{where}: shape is {shape!r:.80}; expected [], one string a row")
    if "scales" not in raw and "outliers" not in raw:
        return Column(tuple(shape), dtype)
    scales = _get(raw, "scales", list, where)
    if dtype != "int8" or not shape or len(scales) != shape[-1] or not all(map(_is_scale, scales)):
        raise StoreError(
            f"{where}: scales are of int8 vectors, as many float32 above 0 as the last of the sizes"
        )
    outliers = _get(raw, "outliers", list, where)
    if not all(type(i) is int and 0 <= i < shape[-1] for i in outliers) or (
        outliers != sorted(set(outliers))
    ):
        raise StoreError(f"{where}: outliers are {outliers!r:.80}; expected channels, rising")
    return Column(tuple(shape), dtype, tuple(map(float, scales)), tuple(outliers))


def _is_scale(value: Any) -> bool:
    if type(value) not in (int, float) or not 0 < value < 2.0**127:
        return False
    return float(np.float32(value)) == value


def _segment(raw: Any, columns: Mapping[str, Column], chunk_rows: int, where: str) -> Segment:
    path, rows = _get(raw, "path", str, where), _positive(raw, "rows", where)
    if not _SEGMENT.fullmatch(path):
        raise StoreError(f"{where}: path is {path!r}; expected a folder name 'segment-...'")
    files = {n: _file(f, f"{where}: {n}") for n, f in _get(raw, "files", dict, where).items()}
    if sorted(files) != sorted(segment_files(columns)):
        raise StoreError(f"{where}: its files are not those of the store's columns. {_AGAIN}")
    for name, column in ((n, c) for n, c in columns.items() if c.stored):
        size, want = files[f"{name}/{column.shard}"].bytes, shard_bytes(column, rows, chunk_rows)
        if size != want:
            raise StoreError(f"{where}: {name} has {size} bytes; {rows} rows take {want}. {_AGAIN}")
    return Segment(path, rows, _get(raw, "cursor", dict, where), files, _dropped(raw, where))


def _dropped(raw: Any, where: str) -> int:
    dropped = _get({"dropped": 0, **raw}, "dropped", int, where)
    if dropped < 0:
        raise StoreError(f"{where}: dropped is {dropped}; expected a whole number from 0. {_AGAIN}")
    return dropped


def _file(raw: Any, where: str) -> FileRecord:
    size, sha = _positive(raw, "bytes", where), _get(raw, "sha256", str, where)
    if not _SHA256.fullmatch(sha):
        raise StoreError(f"{where}: sha256 is {sha!r:.80}; expected 64 hex digits")
    return FileRecord(size, sha)


def _stats(raw: dict[str, Any], columns: Mapping[str, Column], where: str) -> dict:
    try:
        return stats_from_json(raw, {name: c.shape for name, c in columns.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise StoreError(f"{where}: stats are not readable ({err}). {_AGAIN}") from err
