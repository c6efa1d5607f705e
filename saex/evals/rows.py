"""Rows of a store as evaluations read them: fixed-size blocks, spread evenly, with their masks."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saex.data import joined
from saex.data.exclude import numbers


class Block(NamedTuple):
    """One block of ``batch`` rows; the last of a store is filled up with rows that do not count.

    x: [batch, d] in the stored dtype. y: what shall be reconstructed: x itself, or the target's
    rows [batch, d_out]. tokens, positions: int32 [batch], or None where the store has
    no such column. kept: bool [batch], rows that count. start: the store's row number of row 0.
    """

    x: np.ndarray
    y: np.ndarray
    tokens: np.ndarray | None
    positions: np.ndarray | None
    kept: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """One site's column of an open ``saex.data.store.Store``, and the rows that do not count.

    Fields:
      store: the store; its columns ``tokens`` and ``position`` are used where there are any.
      site: the column of activations; "a+b": of two sites side by side.
      skip_positions: positions in the context that are left out (a store without positions has
        none to leave out). skip_tokens: token ids that are left out.
      batch: rows a block; shapes are fixed, so that one program serves all. A multiple of the
        number of devices that share the rows. Small blocks stay in a CPU's cache.
      target: the column that is to be predicted from the site (of a transcoder); None: the site.
      skip: other columns of numbers or strings -> values by which rows are left out.
      max_norms: columns of norms -> the largest norm of a row that counts; a number for each of
        the stores that are mixed, one where none are.
    """

    store: Any
    site: str
    skip_positions: tuple[int, ...] = ()
    skip_tokens: tuple[int, ...] = ()
    batch: int = 1024
    target: str | None = None
    skip: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    max_norms: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.site, self.predicted):
            joined.column(self.store, name)
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: at least 1 row a block is needed")
        if self.store.rows == 0:
            raise ValueError(f"the store of site {self.site!r} has no rows: harvest some")

    @property
    def predicted(self) -> str:
        """The column that a reconstruction is compared with."""
        return self.site if self.target is None else self.target

    @property
    def skips_more(self) -> bool:
        """Whether rows are left out by more than their positions and tokens (see ``counts``)."""
        return bool(self.skip or self.max_norms)

    def check_widths(self, sae: Any) -> None:
        """Raise the store's error where its rows are not of the dictionary's widths."""
        joined.column(self.store, self.site, sae.d_in)
        joined.column(self.store, self.predicted, sae.d_out)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The site's rows [start, stop)."""
        return joined.read(self.store, self.site, start, stop)

    def blocks(self, at_most: int | None = None, stop: int | None = None) -> Iterator[Block]:
        """Rows before ``stop``, in order; of more, about ``at_most`` in blocks spread evenly."""
        count = -(-min(self.store.rows, stop or self.store.rows) // self.batch)
        for i in evenly(count, min(count, self.count(at_most))):
            yield self._block(int(i) * self.batch)

    def count(self, at_most: int | None = None) -> int:
        """How many blocks ``blocks(at_most)`` gives."""
        rows = self.store.rows if at_most is None else min(at_most, self.store.rows)
        return -(-rows // self.batch)

    def _block(self, start: int) -> Block:
        stop = min(start + self.batch, self.store.rows)
        tokens, positions = (self._column(n, start, stop) for n in ("tokens", "position"))
        kept = np.arange(self.batch) < stop - start
        kept &= keep(tokens, self.skip_tokens, self.batch)
        kept &= keep(positions, self.skip_positions, self.batch)
        kept &= _filled(self.counts(start, stop), self.batch)
        x = y = _filled(self.read(start, stop), self.batch)
        if self.target is not None:
            y = _filled(joined.read(self.store, self.target, start, stop), self.batch)
        return Block(x, y, tokens, positions, kept, start)

    def counts(self, start: int, stop: int) -> np.ndarray:
        """Bool [stop - start]: which rows ``skip`` and ``max_norms`` leave in."""
        out = np.ones(stop - start, bool)
        for name, values in self.skip.items():
            left_out = tuple(numbers(self.store, name, values))
            out &= keep(self.store.read(name, start, stop), left_out, stop - start)
        for name, limits in self.max_norms.items():
            out &= self.store.read(name, start, stop) <= self._each(limits, start, stop)
        return out

    def _each(self, values: Sequence[float], start: int, stop: int) -> np.ndarray:
        """float32 [stop - start]: of the stores' values, that of the store each row is of."""
        ends = np.cumsum([one.rows for one in getattr(self.store, "stores", (self.store,))])
        stores = np.searchsorted(ends, np.arange(start, stop), side="right")
        return np.asarray(values, np.float32)[stores]

    def _column(self, name: str, start: int, stop: int) -> np.ndarray | None:
        if name not in self.store.columns:
            return None
        return _filled(self.store.read(name, start, stop).astype(np.int32), self.batch)


def keep(values: np.ndarray | None, skipped: tuple[int, ...], count: int) -> np.ndarray:
    """Bool [count]: which values are not among the skipped; all where there are no values."""
    if values is None or not skipped:
        return np.ones(count, bool)
    return ~np.isin(values, skipped)


def evenly(count: int, wanted: int) -> np.ndarray:
    """``wanted`` of the numbers 0..count-1, in order and equally far apart."""
    return np.arange(wanted, dtype=np.int64) * count // max(wanted, 1)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) == count:
        return rows
    out = np.zeros((count, *rows.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    return out
