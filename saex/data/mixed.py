"""Several stores as one, by weight: every batch has the same share of rows of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from saex.data.manifest import STRING, Column, StoreError
from saex.data.quantise import as_read
from saex.data.ranges import row_range
from saex.data.split import Part, open_split
from saex.data.store import Store
from saex.data.store_remote import is_remote
from saex.data.strings import union

# Weights as whole numbers, so that shares are exact at any step.
_UNIT = 2**32


class Mixed:
    """Open stores and their weights. Rows are those of the stores, one behind the other.

    A stream of it takes from each store its share of every batch, and begins a store's next epoch
    when its rows are used up, whatever the others do.

    Attributes:
      stores: the stores, or their sides.
      weights: the share of each in a batch; they sum to 1.
      path: names the stores, for messages.
    """

    def __init__(self, stores: Sequence[Store | Part], weights: Sequence[float], path: Path):
        """Checks stores against each other.

        Raises:
          StoreError: no store, a weight that is not a number above 0, or stores without a column
            in common.
        """
        if not stores or len(stores) != len(weights):
            raise StoreError(
                f"{path}: {len(stores)} stores and {len(weights)} weights; give each one"
            )
        if not all(0 < w < float("inf") for w in weights):
            raise StoreError(f"{path}: weights are {list(weights)}; expected numbers above 0")
        self.path = path
        self.weights = tuple(w / sum(weights) for w in weights)
        self.columns = _common(stores, path)
        texts = [name for name, column in self.columns.items() if column.dtype == STRING]
        self._strings = {name: union(s.strings(name) for s in stores) for name in texts}
        self.stores = tuple(s.aligned(self._strings) for s in stores) if texts else tuple(stores)
        self._ends = np.cumsum([s.rows for s in stores])

    @property
    def rows(self) -> int:
        """Rows of all stores."""
        return int(self._ends[-1])

    @property
    def complete(self) -> bool:
        """Whether all stores are."""
        return all(s.complete for s in self.stores)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, at most."""
        return max(s.chunk_rows for s in self.stores)

    @property
    def digest(self) -> str:
        """SHA-256 (hex): the identity of the stores' content and of their weights."""
        parts = [[s.digest, w] for s, w in zip(self.stores, self.weights)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def column(self, name: str, width: int | None = None) -> Column:
        """As `Store.column`; a column that all stores have alike."""
        if name not in self.columns:
            raise StoreError(
                f"the stores of {self.path} have no column {name!r} in common; they share "
                f"{', '.join(self.columns)}"
            )
        return self.stores[0].column(name, width)

    def strings(self, name: str) -> tuple[str, ...]:
        """As `Store.strings`, of all stores together."""
        return self.stores[0].strings(name)

    def read(
        self,
        name: str,
        start: SupportsIndex = 0,
        stop: SupportsIndex | None = None,
        checksums: bool = False,
    ) -> np.ndarray:
        """Rows [start, stop) of the stores one behind the other, as `Store.read`."""
        column = self.column(name)
        begin, end = row_range(start, stop, self.rows, self.path)
        out, at = np.empty((end - begin, *column.shape), column.numpy_dtype), begin
        while at < end:
            place = int(np.searchsorted(self._ends, at, side="right"))
            before = int(self._ends[place - 1]) if place else 0
            stop = min(end, int(self._ends[place]))
            ranges = [(at - before, stop - before)]
            self.stores[place].read_ranges(name, ranges, out[at - begin : stop - begin], checksums)
            at = stop
        return out


def open_mixed(file: Path, split: str) -> Mixed:
    """Opens one side of the stores that a JSON file names, to be mixed by weight.

    The file is `{"stores": [{"path": "web", "weight": 3}, {"path": "code", "weight": 1}]}`; a path
    is whatever `open_split` takes except another such file, relative to the file's folder, or a
    place on an object store.

    Raises:
      StoreError: the file is missing or says something else, or a store is damaged.
    """
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        named = [(str(s["path"]), float(s["weight"])) for s in body["stores"]]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise StoreError(
            f"{file} does not name stores to mix ({err!r}); expected "
            '{"stores": [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]}'
        ) from err
    sides = []
    for name, _ in named:
        side = open_split(name if is_remote(name) else file.parent / name, split)
        if isinstance(side, Mixed):
            raise StoreError(f"{file} names {name}: a mixture in a mixture; name its stores")
        sides.append(side)
    return Mixed(sides, [weight for _, weight in named], file)


class Shares:
    """How many of a lane's first rows come from each store: exact, and evenly spread."""

    def __init__(self, weights: Sequence[float]):
        self._units = [round(w * _UNIT) for w in weights]
        # What rounding leaves goes to the largest, whose count still never falls (see `least`).
        self._largest = max(range(len(weights)), key=self._units.__getitem__)

    def before(self, row: int) -> list[int]:
        """Rows of each store among the first `row` rows."""
        counts = [units * row // _UNIT for units in self._units]
        counts[self._largest] += row - sum(counts)
        return counts

    @property
    def least(self) -> int:
        """Rows that a lane must give to a batch, so that no store's share is below 0."""
        return -(-len(self._units) * _UNIT // self._units[self._largest])


def _common(stores: Sequence[Store | Part], path: Path) -> dict[str, Column]:
    first, *rest = stores
    shared = {n: c for n, c in first.columns.items() if all(_alike(s, n, c) for s in rest)}
    if not shared:
        raise StoreError(f"the stores of {path} have no column of equal shape and dtype in common")
    return shared


def _alike(store: Store | Part, name: str, column: Column) -> bool:
    """Whether a store's rows are read as those of a column are; scales may differ."""
    other = store.columns.get(name)
    return other is not None and as_read(other) == as_read(column)
