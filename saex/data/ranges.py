"""Ranges of rows, as readers of stores are asked for them."""

from __future__ import annotations

from operator import index
from typing import SupportsIndex

from saex.data.manifest import StoreError


def row_range(
    start: SupportsIndex, stop: SupportsIndex | None, rows: int, where: object
) -> tuple[int, int]:
    """[start, stop) as whole numbers, `stop` None being the end.

    Args:
      start, stop: what was asked for.
      rows: how many rows there are.
      where: what is read, for the message.

    Raises:
      StoreError: the range is not inside of the rows.
    """
    begin, end = index(start), rows if stop is None else index(stop)
    if not 0 <= begin <= end <= rows:
        raise StoreError(f"rows {begin} to {end} asked of {where}: it has {rows}")
    return begin, end
