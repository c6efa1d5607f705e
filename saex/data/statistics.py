"""Statistics of a column: sums in float64, so that parts can be merged into the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Rows converted to float64 at a time: small enough for the cache, large enough for numpy.
_BLOCK = 512


@dataclass(frozen=True)
class ColumnStats:
    """Count, sum and sum of squares per element of one column, in float64.

    `a.merge(b)` are the statistics of the rows of `a` and `b` together. The order of merging
    is part of the result in the last bits (float64 addition), so merge in the order of the rows.

    Attributes:
      count: rows.
      sum: [*shape] sum over rows; None for columns that are not floating point.
      sum_sq: [*shape] sum over rows of the squares; None likewise.
    """

    count: int
    sum: np.ndarray | None = None
    sum_sq: np.ndarray | None = None

    @staticmethod
    def of(rows: np.ndarray, is_float: bool = True) -> ColumnStats:
        """Statistics of `rows` [rows, *shape]; of integer columns only the count."""
        if not is_float:
            return ColumnStats(len(rows))
        total, squares = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
        for i in range(0, len(rows), _BLOCK):
            block = rows[i : i + _BLOCK].astype(np.float64)
            total += block.sum(axis=0)
            squares += np.einsum("i...,i...->...", block, block)
        return ColumnStats(len(rows), total, squares)

    def merge(self, other: ColumnStats) -> ColumnStats:
        """The statistics of both sets of rows together."""
        if self.sum is None or self.sum_sq is None:
            return ColumnStats(self.count + other.count)
        return ColumnStats(
            self.count + other.count, self.sum + other.sum, self.sum_sq + other.sum_sq
        )

    @property
    def mean(self) -> np.ndarray:
        """[*shape] mean over rows. Raises ValueError for integer columns and no rows."""
        return _needed(self.sum, self.count) / self.count

    @property
    def mean_sq_norm(self) -> float:
        """Mean over rows of the squared norm. Raises ValueError as `mean` does."""
        return float(_needed(self.sum_sq, self.count).sum() / self.count)

    @property
    def variance(self) -> np.ndarray:
        """[*shape] variance over rows (divided by count). Raises ValueError as `mean` does."""
        return _needed(self.sum_sq, self.count) / self.count - self.mean**2


def merge_all(parts: list[dict[str, ColumnStats]]) -> dict[str, ColumnStats]:
    """Merges the statistics of segments, in their order, column by column."""
    total: dict[str, ColumnStats] = {}
    for part in parts:
        total = {n: total[n].merge(s) if n in total else s for n, s in part.items()}
    return total


def stats_to_json(stats: Mapping[str, ColumnStats]) -> dict[str, Any]:
    """Statistics as JSON. Mean and mean squared norm are there for readers; the sums count."""
    return {name: _to_json(s) for name, s in stats.items()}


def stats_from_json(
    raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ColumnStats]:
    """The inverse of `stats_to_json`; exact, since JSON floats hold all digits.

    Raises:
      ValueError, TypeError, KeyError: unknown column, or sums of another shape.
    """
    return {name: _from_json(name, s, shapes[name]) for name, s in raw.items()}


def _to_json(stats: ColumnStats) -> dict[str, Any]:
    if stats.sum is None or stats.sum_sq is None or not stats.count:
        return {"count": stats.count}
    return {
        "count": stats.count,
        "mean_sq_norm": stats.mean_sq_norm,
        "mean": stats.mean.tolist(),
        "sum": stats.sum.tolist(),
        "sum_sq": stats.sum_sq.tolist(),
    }


def _from_json(name: str, raw: dict[str, Any], shape: tuple[int, ...]) -> ColumnStats:
    count = raw["count"]
    if type(count) is not int or count < 0:
        raise ValueError(f"count of {name} is {count!r}")
    if "sum" not in raw:
        return ColumnStats(count)
    total, squares = np.asarray(raw["sum"], np.float64), np.asarray(raw["sum_sq"], np.float64)
    if total.shape != shape or squares.shape != shape:
        raise ValueError(f"sums of {name} have shape {total.shape}, its rows {shape}")
    return ColumnStats(count, total, squares)


def _needed(value: np.ndarray | None, count: int) -> np.ndarray:
    if value is None or count == 0:
        raise ValueError("no statistics: the column is not floating point or has no rows")
    return value
