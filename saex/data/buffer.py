"""Rows on their way into a store: checked, rounded to the stored dtype, held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from saex.data import quantise
from saex.data.arrays import as_numpy
from saex.data.manifest import STRING, Column, StoreError
from saex.data.strings import Codes

# Elements looked at together: small enough for the cache.
_BLOCK = 2**17


class RowBuffer:
    """Row-aligned columns in memory that is kept from one segment to the next.

    Fresh memory costs more than the copy into it (first touch), so `clear` keeps the arrays.

    Attributes:
      rows: rows that are held.
      dropped: rows that were passed over because they hold NaN or infinity.
      clipped: int8 column with scales -> values that were beyond its largest code.
    """

    def __init__(self, columns: dict[str, Column], max_bytes: int, drop: bool = False):
        self._drop, self._columns = drop, columns
        stored = {n: c for n, c in quantise.with_parts(columns).items() if c.stored}
        self._max_rows = max_bytes // max(1, sum(c.row_bytes for c in stored.values()))
        self._arrays = {n: np.empty((0, *c.shape), c.numpy_dtype) for n, c in stored.items()}
        self._ordered = dict(self._arrays)
        self._codes = {n: Codes() for n, c in columns.items() if c.dtype == STRING}
        self.clear()

    def view(self, order: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The rows, [rows, *shape] by array as it will be on disk (strings: see `strings`); valid
        until the next call of any method.

        Args:
          order: [rows] a permutation, which row is where; None: as they came.
        """
        rows = {name: array[: self.rows] for name, array in self._arrays.items()}
        if order is None:
            return rows
        for name, array in self._arrays.items():
            if self._ordered[name].shape != array.shape:
                self._ordered[name] = np.empty_like(array)
        # mode="clip" lets numpy write into `out` without a buffer between.
        return {
            name: np.take(values, order, 0, self._ordered[name][: self.rows], "clip")
            for name, values in rows.items()
        }

    def strings(self, name: str, codes: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The strings behind numbers of a column of the view, sorted, and each one's place."""
        return self._codes[name].sorted(codes)

    def clear(self) -> None:
        """Forgets the rows and keeps the memory."""
        self.rows = self.dropped = 0
        self.clipped = dict.fromkeys(self._columns, 0)
        for codes in self._codes.values():
            codes.clear()

    def append(self, rows: Mapping[str, Any], first_row: int) -> None:
        """Copies rows in. `first_row` is the first one's number in the store, for messages.

        Raises:
          StoreError: as `StoreWriter.append`; then nothing was taken.
        """
        numbered = {n: c.encode(n, rows[n]) for n, c in self._codes.items() if n in rows}
        checked, dropped = check_rows({**rows, **numbered}, self._columns, first_row, self._drop)
        more = len(next(iter(checked.values())))
        if self.rows + more > self._max_rows:
            raise StoreError(
                f"{self.rows + more} rows are not committed; memory was allowed for "
                f"{self._max_rows}: commit more often, or raise max_buffer_bytes"
            )
        self._reserve(self.rows + more)
        for name, values in checked.items():
            for array, part in self._encoded(name, values).items():
                self._arrays[array][self.rows : self.rows + more] = part
        self.rows += more
        self.dropped += dropped

    def _encoded(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that a column's values become on disk."""
        column = self._columns[name]
        if column.stored:
            return {name: values}
        arrays, clipped = quantise.encode(name, column, values)
        self.clipped[name] += clipped
        return arrays

    def _reserve(self, rows: int) -> None:
        for name, array in self._arrays.items():
            if len(array) < rows:
                size = min(max(rows, 2 * len(array)), self._max_rows)
                grown = np.empty((size, *array.shape[1:]), array.dtype)
                grown[: self.rows] = array[: self.rows]
                self._arrays[name] = grown


def check_rows(
    rows: Mapping[str, Any], columns: Mapping[str, Column], first_row: int, drop: bool = False
) -> tuple[dict[str, np.ndarray], int]:
    """Rows in the dtypes of the columns, [rows, *shape] each, and how many were dropped.

    Raises:
      StoreError: names, shapes, kinds or lengths that do not fit; NaN or infinity unless `drop`.
    """
    if set(rows) != set(columns):
        raise StoreError(
            f"rows have the columns {sorted(rows)}; the store has {sorted(columns)}: "
            "append all columns together, so that they stay row-aligned"
        )
    checked = {n: _cast(n, as_numpy(n, rows[n]), c) for n, c in columns.items()}
    lengths = {n: len(v) for n, v in checked.items()}
    if len(set(lengths.values())) > 1:
        raise StoreError(f"columns of unequal length: {lengths}; give each row in all of them")
    hurt = np.zeros(next(iter(lengths.values())), bool)
    for name, values in checked.items():
        if columns[name].is_float and not all_finite(values):
            bad = _non_finite(values)
            if not drop:
                _refuse(name, bad, first_row)
            hurt |= bad.any(axis=1)
    if hurt.any():
        checked = {name: values[~hurt] for name, values in checked.items()}
    return checked, int(hurt.sum())


def all_finite(values: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; in blocks that stay in the cache."""
    flat = values.reshape(-1)
    blocks = (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))
    if values.dtype.kind == "f":
        return all(np.isfinite(block).all() for block in blocks)
    # bfloat16 by its bits, which is much faster: the exponent is all ones.
    return all((block.view(np.uint16) & 0x7FFF).max() < 0x7F80 for block in blocks)


def _cast(name: str, values: np.ndarray, column: Column) -> np.ndarray:
    if values.ndim < 1 or values.shape[1:] != column.shape:
        raise StoreError(
            f"column {name!r} was given an array of shape {values.shape}; "
            f"expected [rows, {', '.join(map(str, column.shape))}]"
        )
    # Kind "V" is ml_dtypes (bfloat16 and its like), "f" and "iub" are numpy's own.
    if (values.dtype.kind in "fV") != column.is_float or values.dtype.kind not in "fViub":
        kind = column.dtype if column.stored else "int8 with scales, for floating point"
        raise StoreError(f"column {name!r} is {kind}, its values are {values.dtype}")
    if not column.is_float:
        _refuse_overflow(name, values, column)
    with np.errstate(over="ignore"):  # what overflows is refused as infinite right after
        return np.ascontiguousarray(values.astype(column.numpy_dtype, copy=False))


def _refuse_overflow(name: str, values: np.ndarray, column: Column) -> None:
    info = np.iinfo(column.numpy_dtype)
    if values.size and not (info.min <= int(values.min()) and int(values.max()) <= info.max):
        raise StoreError(
            f"column {name!r} is {column.dtype}; values go from {values.min()} to {values.max()}"
        )


def _non_finite(values: np.ndarray) -> np.ndarray:
    """[rows, elements] bool."""
    return ~np.isfinite(values.astype(np.float32)).reshape(len(values), -1)


def _refuse(name: str, bad: np.ndarray, first_row: int) -> None:
    hurt = np.flatnonzero(bad.any(axis=1))
    raise StoreError(
        f"column {name!r} has {int(bad.sum())} values that are NaN or infinite, in {len(hurt)} "
        f"of {len(bad)} rows; the first is row {first_row + int(hurt[0])} of the store, element "
        f"{int(bad[hurt[0]].argmax())}. Nothing of it was taken: mend what makes these rows, or "
        "leave such rows out (StoreWriter(non_finite='drop'), harvest.non_finite='drop')"
    )
