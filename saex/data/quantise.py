"""Vectors as int8 with a scale for each channel; channels that this would hurt stay bfloat16.

A quantised column is made of two ordinary ones, NAME.codes and NAME.outliers, and reads as float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from saex.data.arrays import as_numpy
from saex.data.manifest import STRING, Column, StoreError

CODES, OUTLIERS = ".codes", ".outliers"
# Codes go from -127 to 127, so that a channel and its negative are treated alike.
_LARGEST = 127
# What was not seen in the calibration may be somewhat larger than what was.
_HEADROOM = 1.25
# Rows converted together: small enough for the cache.
_BLOCK = 256


def calibrate(rows: Any, max_noise: float = 1e-3, max_outliers: int | None = None) -> Column:
    """The column that stores rows such as these in one byte a channel.

    A channel's scale makes 1.25 times its largest absolute value the largest code. Rounding then
    errs by `scale / 2` at most and has the variance `scale**2 / 12`; a channel where that is more
    than `max_noise` of its own variance (a few huge values, or a large mean) is an outlier, and is
    kept in bfloat16. Of more than `max_outliers` channels, those of the largest scales are.

    Args:
      rows: [rows, ..., channels] floating point, as `StoreWriter.append` takes it: a sample of what
        will be stored, some thousands. NaN and infinity are passed over.
      max_noise: share of a channel's variance.
      max_outliers: at most so many channels; None: a sixteenth of them.

    Raises:
      StoreError: no rows, or rows that are not vectors of floating point.
    """
    values = as_numpy("of the sample", rows)
    if values.ndim < 2 or not values.size or values.dtype.kind not in "fV":
        raise StoreError(
            f"cannot calibrate on values of shape {values.shape} and dtype {values.dtype}; "
            "expected floating point, [rows, channels], at least one row"
        )
    shape, channels = values.shape[1:], values.shape[-1]
    flat = values.reshape(-1, channels).astype(np.float32)
    flat = flat[np.isfinite(flat).all(axis=1)]
    if not len(flat):
        raise StoreError("cannot calibrate: every row holds NaN or infinity")
    scales = _scales(np.abs(flat).max(axis=0))
    noise = scales.astype(np.float64) ** 2 / 12
    worse = np.flatnonzero(noise > max_noise * flat.var(axis=0, dtype=np.float64))
    most = channels // 16 if max_outliers is None else max_outliers
    outliers = np.sort(worse[np.argsort(-scales[worse], kind="stable")][:most])
    return Column(shape, "int8", tuple(scales.tolist()), tuple(outliers.tolist()))


def parts(name: str, column: Column) -> dict[str, Column]:
    """The columns that a quantised column is made of; {} for another column."""
    if column.scales is None:
        return {}
    found = {name + CODES: Column(column.shape, "int8")}
    if column.outliers:
        found[name + OUTLIERS] = Column((*column.shape[:-1], len(column.outliers)), "bfloat16")
    return found


def with_parts(columns: Mapping[str, Column]) -> dict[str, Column]:
    """The columns, and right after each that is quantised those that it is made of.

    Raises:
      StoreError: a name that is needed for a part is taken.
    """
    found: dict[str, Column] = {}
    for name, column in columns.items():
        own = {name: column, **parts(name, column)}
        if taken := [n for n in own if n in found or (n != name and n in columns)]:
            raise StoreError(
                f"column {taken[0]!r} is a part of the int8 column {name!r}; rename it"
            )
        found |= own
    return found


def encode(name: str, column: Column, values: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Finite float32 values [rows, *shape] as the arrays of the parts, and how many were clipped.

    The code is `value / scale`, rounded to the nearest (ties to even) and to -127 ... 127; in
    outlier channels it is 0.
    """
    scales, outliers = column.scale_array, list(column.outliers)
    codes = np.empty(values.shape, np.int8)
    clipped = 0
    for at in range(0, len(values), _BLOCK):
        steps = np.rint(values[at : at + _BLOCK] / scales)
        steps[..., outliers] = 0
        clipped += int((np.abs(steps) > _LARGEST).sum())
        steps = np.clip(steps, -_LARGEST, _LARGEST)
        np.copyto(codes[at : at + _BLOCK], steps, casting="unsafe")
    found: dict[str, np.ndarray] = {name + CODES: codes}
    if column.outliers:
        found[name + OUTLIERS] = values[..., outliers].astype(ml_dtypes.bfloat16)
    return found, clipped


def decoded_blocks(
    name: str, column: Column, arrays: Mapping[str, np.ndarray]
) -> Iterator[np.ndarray]:
    """The rows of a column block by block, float32 [rows, *shape]."""
    for at in range(0, len(arrays[name + CODES]), _BLOCK):
        block = {n: arrays[n][at : at + _BLOCK] for n in parts(name, column)}
        out = np.empty((len(block[name + CODES]), *column.shape), np.float32)
        decode(name, column, block, out)
        yield out


def decode(name: str, column: Column, arrays: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    """The inverse of `encode`: float32 rows into `out` [rows, *shape], `code * scale` each."""
    scales, outliers = column.scale_array, list(column.outliers)
    codes = arrays[name + CODES]
    for at in range(0, len(codes), _BLOCK):
        block = out[at : at + _BLOCK]
        block[...] = codes[at : at + _BLOCK]
        block *= scales  # in two steps, which numpy does in half the time
        if column.outliers:
            block[..., outliers] = arrays[name + OUTLIERS][at : at + _BLOCK]


def as_read(column: Column) -> Column:
    """A column of the shape and dtype that rows of this one have when they are read."""
    dtype = column.dtype if column.dtype == STRING else column.numpy_dtype.name
    return Column(column.shape, dtype)


def _scales(largest: np.ndarray) -> np.ndarray:
    """[channels] float32, above 0: of channels that were always 0 the median of the others."""
    scales = (_HEADROOM / _LARGEST * largest).astype(np.float32)
    seen = scales[scales > 0]
    return np.where(scales > 0, scales, np.median(seen) if len(seen) else np.float32(1))
