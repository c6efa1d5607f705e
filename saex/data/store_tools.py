"""What `saex store` shows: what a store holds, its first rows, whether it is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saex.data import quantise
from saex.data.manifest import STRING
from saex.data.store import Store

_TOKENS = "tokens"
_QUANTILES = (0.01, 0.5, 0.99, 0.999)
# Elements of a vector that are shown.
_SHOWN = 4


def info(store: Store) -> dict[str, Any]:
    """Sizes, columns and statistics of a store, as JSON: nothing but the manifest is read.

    Keys: path, complete, rows, rows_dropped, segments, chunk_rows, bytes, digest, meta, and
    `columns`: for each its shape, dtype and bytes, for vectors of floating point `rms_norm` and,
    where norms were counted, their quantiles; of int8 with scales `outliers`, how many channels are
    bfloat16, and `clipped`, how many values were beyond the largest code.
    """
    return {
        "path": str(store.path),
        "complete": store.complete,
        "rows": store.rows,
        "rows_dropped": store.manifest.dropped,
        "segments": len(store.manifest.segments),
        "chunk_rows": store.chunk_rows,
        "bytes": sum(f.bytes for s in store.manifest.segments for f in s.files.values()),
        "digest": store.digest,
        "columns": {name: _column(store, name) for name in _shown_columns(store)},
        "meta": store.meta,
    }


def info_table(store: Store) -> str:
    """`info` as text, a line per column."""
    found = info(store)
    state = "complete" if found["complete"] else "not complete"
    lines = [
        f"{found['path']}: {found['rows']:,} rows in {found['segments']} segments, "
        f"{_size(found['bytes'])}, {state}",
        f"digest {found['digest']}",
        "",
        f"{'column':32} {'dtype':9} {'shape':10} {'size':>9}  statistics",
    ]
    for name, column in found["columns"].items():
        shape = "x".join(map(str, column["shape"])) or "-"
        rest = [f"{k} {v:.4g}" for k, v in column.items() if isinstance(v, float)]
        rest += [f"{k} {column[k]:,}" for k in ("outliers", "clipped") if k in column]
        size = _size(column["bytes"])
        lines.append(f"{name:32} {column['dtype']:9} {shape:10} {size:>9}  {', '.join(rest)}")
    return "\n".join(lines)


def head(
    store: Store, rows: int = 5, start: int = 0, decode: Callable[[Any], str] | None = None
) -> list[dict[str, Any]]:
    """Rows from `start` on, by column: numbers as they are, of vectors the norm and a few elements.

    Args:
      store: an open store.
      rows: how many, at most.
      start: the first one.
      decode: token ids to text; given, and with a column `tokens`, each row has a `text` too.

    Raises:
      StoreError: rows outside the store, or a damaged file; checksums are checked.
    """
    stop = min(start + rows, store.rows)
    found: list[dict[str, Any]] = [{"row": r} for r in range(start, stop)]
    for name in _shown_columns(store):
        column = store.columns[name]
        strings = store.strings(name) if column.dtype == STRING else ()
        for row, value in zip(found, store.read(name, start, stop, checksums=True)):
            row[name] = strings[value] if strings else _shown(value)
            if name == _TOKENS and decode is not None:
                row["text"] = decode([int(value)])
    return found


def head_table(rows: list[dict[str, Any]]) -> str:
    """`head` as text, a block per row. Text of the store is quoted, control characters escaped."""
    return "\n\n".join(
        "\n".join(f"  {name:30} {_line(value)}" for name, value in row.items()) for row in rows
    )


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return f"norm {value['norm']:.4g}: [{', '.join(f'{x:.4g}' for x in value['first'])}, ...]"
    return ascii(value)


def _shown_columns(store: Store) -> list[str]:
    """The columns without those that an int8 column with scales is made of."""
    hidden = {part for n, c in store.columns.items() for part in quantise.parts(n, c)}
    return [name for name in store.columns if name not in hidden]


def _column(store: Store, name: str) -> dict[str, Any]:
    column, stats = store.columns[name], store.stats.get(name)
    found: dict[str, Any] = {"shape": list(column.shape), "dtype": column.dtype}
    stored = quantise.parts(name, column) or {name: column}
    found["bytes"] = store.rows * sum(c.row_bytes for c in stored.values())
    if not column.stored:
        found["outliers"] = len(column.outliers)
        found["clipped"] = stats.clipped if stats else 0
    if stats is None or stats.sum is None or not stats.count:
        return found
    if not column.shape:
        return {**found, "mean": float(stats.mean), "std": float(np.sqrt(stats.variance))}
    found["rms_norm"] = float(np.sqrt(stats.mean_sq_norm))
    if stats.norms is not None:
        found |= {f"norm_q{100 * q:g}": stats.norm_quantile(q) for q in _QUANTILES}
    return found


def _shown(value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim == 0:
        return array.item()
    flat = array.reshape(-1).astype(np.float32)
    return {"norm": float(np.linalg.norm(flat)), "first": flat[:_SHOWN].tolist()}


def _size(total: int) -> str:
    count = float(total)
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
