"""Statistics of a column: sums in float64, so that parts can be merged into the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Rows converted to float64 at a time: small enough for the cache, large enough for numpy.
_BLOCK = 512
# Upper halves of the float32 that are not negative and finite.
_BINS = 0x7F80


@dataclass(frozen=True)
class ColumnStats:
    """Count, sum and sum of squares per element of one column, in float64.

    `a.merge(b)` are the statistics of the rows of `a` and `b` together. The order of merging
    is part of the result in the last bits (float64 addition), so merge in the order of the rows.

    Attributes:
      count: rows.
      sum: [*shape] sum over rows; None for columns that are not floating point.
      sum_sq: [*shape] sum over rows of the squares; None likewise.
      norms: counts of the rows' norms, by the upper 16 bits of the norm as float32 (128 steps to a
        factor of two); None for columns that are not vectors of floating point.
      clipped: values that were beyond the largest code of an int8 column with scales.
    """

    count: int
    sum: np.ndarray | None = None
    sum_sq: np.ndarray | None = None
    norms: Mapping[int, int] | None = None
    clipped: int = 0

    @staticmethod
    def of(rows: np.ndarray, is_float: bool = True) -> ColumnStats:
        """Statistics of `rows` [rows, *shape]; of integer columns only the count."""
        if not is_float:
            return ColumnStats(len(rows))
        blocks = (rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK))
        return ColumnStats.of_blocks(blocks, rows.shape[1:])

    @staticmethod
    def of_blocks(
        blocks: Iterable[np.ndarray], shape: tuple[int, ...], clipped: int = 0
    ) -> ColumnStats:
        """Statistics of rows that come in blocks [rows, *shape] of floating point."""
        total, squares = np.zeros((2, math.prod(shape)))
        bins: list[np.ndarray] = [np.zeros(0, np.uint32)]
        rows = 0
        for values in blocks:
            block = values.astype(np.float64)
            rows += len(block)
            flat = block.reshape(len(block), -1)
            ones = np.ones(len(flat))  # products with ones: BLAS adds faster than numpy
            total += ones @ flat
            flat *= flat
            squares += ones @ flat
            if shape:
                norms = np.sqrt(flat @ np.ones(flat.shape[1]))
                norms = np.minimum(norms, np.finfo(np.float32).max).astype(np.float32)
                bins.append(norms.view(np.uint32) >> 16)
        counts = np.bincount(np.concatenate(bins))  # once: there are many bins
        filled = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
        total, squares = total.reshape(shape), squares.reshape(shape)
        return ColumnStats(rows, total, squares, filled if shape else None, clipped)

    def merge(self, other: ColumnStats) -> ColumnStats:
        """The statistics of both sets of rows together."""
        if self.sum is None or self.sum_sq is None:
            return ColumnStats(self.count + other.count)
        norms = None
        if self.norms is not None and other.norms is not None:
            keys = sorted({*self.norms, *other.norms})
            norms = {k: self.norms.get(k, 0) + other.norms.get(k, 0) for k in keys}
        # Sums of numbers stay arrays (of no axis), as numpy would not have it.
        total, squares = np.asarray(self.sum + other.sum), np.asarray(self.sum_sq + other.sum_sq)
        clipped = self.clipped + other.clipped
        return ColumnStats(self.count + other.count, total, squares, norms, clipped)

    def norm_quantile(self, q: float) -> float:
        """The norm that a share `q` of the rows does not exceed, to 0.4% (half a step).

        Raises ValueError where norms were not counted.
        """
        if not self.norms or not 0 <= q <= 1:
            raise ValueError(f"no quantile {q}: norms were not counted, or it is not in [0, 1]")
        keys = sorted(self.norms)
        ends = np.cumsum([self.norms[k] for k in keys])
        key = keys[min(int(np.searchsorted(ends, q * ends[-1])), len(keys) - 1)]
        edges = np.array([key << 16, (key + 1) << 16], np.uint32).view(np.float32)
        return float(edges.mean())

    @property
    def mean(self) -> np.ndarray:
        """[*shape] mean over rows. Raises ValueError for integer columns and no rows."""
        return np.asarray(_needed(self.sum, self.count) / self.count)

    @property
    def mean_sq_norm(self) -> float:
        """Mean over rows of the squared norm. Raises ValueError as `mean` does."""
        return float(_needed(self.sum_sq, self.count).sum() / self.count)

    @property
    def variance(self) -> np.ndarray:
        """[*shape] variance over rows (divided by count). Raises ValueError as `mean` does."""
        return np.asarray(_needed(self.sum_sq, self.count) / self.count - self.mean**2)


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
    found = {
        "count": stats.count,
        "mean_sq_norm": stats.mean_sq_norm,
        "mean": stats.mean.tolist(),
        "sum": stats.sum.tolist(),
        "sum_sq": stats.sum_sq.tolist(),
    }
    if stats.norms is not None:
        found["norms"] = {str(k): n for k, n in stats.norms.items()}
    if stats.clipped:
        found["clipped"] = stats.clipped
    return found


def _from_json(name: str, raw: dict[str, Any], shape: tuple[int, ...]) -> ColumnStats:
    count = raw["count"]
    if type(count) is not int or count < 0:
        raise ValueError(f"count of {name} is {count!r}")
    if "sum" not in raw:
        return ColumnStats(count)
    total, squares = np.asarray(raw["sum"], np.float64), np.asarray(raw["sum_sq"], np.float64)
    if total.shape != shape or squares.shape != shape:
        raise ValueError(f"sums of {name} have shape {total.shape}, its rows {shape}")
    clipped = raw.get("clipped", 0)
    if type(clipped) is not int or clipped < 0:
        raise ValueError(f"clipped of {name} is {clipped!r}")
    return ColumnStats(count, total, squares, _norms(name, raw.get("norms"), count), clipped)


def _norms(name: str, raw: Any, count: int) -> dict[int, int] | None:
    if raw is None:
        return None
    norms = {int(k): n for k, n in raw.items()}
    whole = all(type(n) is int and n > 0 and 0 <= k < _BINS for k, n in norms.items())
    if not whole or sum(norms.values()) != count:
        raise ValueError(f"norms of {name} are not counts of {count} rows")
    return norms


def _needed(value: np.ndarray | None, count: int) -> np.ndarray:
    if value is None or count == 0:
        raise ValueError("no statistics: the column is not floating point or has no rows")
    return value
