"""Columns side by side: the name "a+b" stands for the columns a and b as one, of their widths' sum.

So a crosscoder's rows are the rows of its sites, one behind the other, and whoever reads rows of
one site reads those of several.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saex.data.manifest import Column, StoreError
from saex.data.quantise import as_read


def parts(name: str) -> list[str]:
    """The names of a store's own columns that a name is made of."""
    return name.split("+")


def column(store: Any, name: str, width: int | None = None) -> Column:
    """The column, as `Store.column`; of several, vectors of equal dtype, as one.

    Raises:
      StoreError: one that is not there or is no vector, unequal dtypes, or another width.
    """
    if len(parts(name)) == 1:
        return store.column(name, width)
    columns = [as_read(store.column(part)) for part in parts(name)]
    for part, one in zip(parts(name), columns):
        if len(one.shape) != 1 or one.dtype != columns[0].dtype:
            raise StoreError(
                f"{store.path}: {name} joins {part!r}, which has shape {one.shape} and dtype "
                f"{one.dtype}; expected vectors of dtype {columns[0].dtype}"
            )
    whole = Column(shape=(sum(one.shape[0] for one in columns),), dtype=columns[0].dtype)
    if width is not None and whole.shape != (width,):
        raise StoreError(
            f"{store.path}: {name} has width {whole.shape[0]}, and {width} was expected"
        )
    return whole


def read(store: Any, name: str, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a column, or of several side by side."""
    rows = [store.read(part, start, stop) for part in parts(name)]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
