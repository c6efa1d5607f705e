"""Which rows are streamed: rules on positions, tokens, norms and any other column of numbers,
resolved before the first step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from saex.data.manifest import STRING, StoreError
from saex.data.split import Part
from saex.data.store import Store

POSITION, TOKENS = "position", "tokens"
NORM = ".norm"  # SITE.norm is the column of the norms of column SITE
# What a stream excludes unless told otherwise: in many models position 0 is an attention sink.
DEFAULT_POSITIONS = (0,)


@dataclass(frozen=True)
class Kept:
    """The rows that are streamed.

    Attributes:
      chunks: [chunks, 2] int64, row range of each chunk of the store.
      counts: [chunks] int64, kept rows of each.
      mask: [rows] bool, or None where every row is kept.
      info: numbers and rules, for the log.
    """

    chunks: np.ndarray
    counts: np.ndarray
    mask: np.ndarray | None
    info: dict[str, Any]

    def places(self, chunks: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where rows are when these chunks are read one behind the other, int64.

        Args:
          chunks: [n] numbers of chunks.
          begins, ends: [n] from which to which of its kept rows each chunk gives.
        """
        if self.mask is None:
            rows, counts = np.diff(self.chunks[chunks])[:, 0], ends - begins
            ahead = np.cumsum(rows) - rows + begins - (np.cumsum(counts) - counts)
            return np.repeat(ahead, counts) + np.arange(counts.sum())
        parts, at = [np.zeros(0, np.int64)], 0
        for chunk, low, high in zip(chunks, begins, ends):
            start, stop = self.chunks[chunk]
            parts.append(np.flatnonzero(self.mask[start:stop])[low:high] + at)
            at += stop - start
        return np.concatenate(parts)


def resolve(
    store: Store | Part,
    positions: Sequence[int],
    tokens: Sequence[int],
    max_norm: float = 0.0,
    sites: Sequence[str] = (),
    values: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Kept:
    """Applies the rules to every row of the store.

    Args:
      store: its columns `position` and `tokens` are read.
      positions: positions in the context that are left out. The default (0,) passes over a store
        without positions (rows that are not text); anything else needs the column.
      tokens: token ids that are left out.
      max_norm: rows are left out whose norm at one of `sites` is more than this many times the
        median over all rows of the store; 0: none.
      sites: columns; each needs its norms, as a harvest writes them (`SITE.norm`).
      values: column -> what rows are left out by, in any column of one whole number or string a
        row.

    Raises:
      StoreError: a rule whose column the store does not have, or that its column cannot hold.
    """
    chunks, rules = store.chunks(), {}
    if POSITION in store.columns or tuple(positions) != DEFAULT_POSITIONS:
        rules[POSITION] = tuple(positions)
    rules[TOKENS] = tuple(tokens)
    for name, left_out in values.items():
        rules[name] = (*rules.get(name, ()), *left_out)
    mask, info = _apply(store, {k: v for k, v in rules.items() if v})
    for site in sites if max_norm else ():
        mask = _within(store, site, max_norm, mask, info)
    return kept_rows(chunks, mask, info)


def kept_rows(chunks: np.ndarray, mask: np.ndarray | None, info: Mapping[str, Any]) -> Kept:
    """What is kept by a mask [rows], with the counts of the chunks [chunks, 2]."""
    counts = chunks[:, 1] - chunks[:, 0]
    if mask is not None and len(chunks):
        counts = np.add.reduceat(mask, chunks[:, 0], dtype=np.int64)
    return Kept(chunks, counts, mask, {**info, "rows_kept": int(counts.sum())})


def _apply(
    store: Store | Part, rules: dict[str, tuple[Any, ...]]
) -> tuple[np.ndarray | None, dict]:
    info: dict[str, Any] = {"rows": store.rows}
    mask = None
    for name, values in rules.items():
        left_out = numbers(store, name, values)
        _check_known(store, name, values)
        column = store.read(name)
        keep = column != left_out[0] if len(left_out) == 1 else ~np.isin(column, left_out)
        mask, info[f"rows_excluded_by_{name}"] = _narrow(mask, keep)
        info[f"excluded_{name}"] = list(values)
    return mask, info


def numbers(store: Store | Part, name: str, values: Sequence[Any]) -> list[int]:
    """The values of a rule as the numbers of its column; -1 for a string that no row has.

    Raises:
      StoreError: no such column, or values that it cannot hold.
    """
    if name not in store.columns:
        mend = f"leave {name!r} out of stream.exclude"
        if name in (POSITION, TOKENS):
            mend = f"set stream.exclude_{name.rstrip('s')}s=()"
        raise StoreError(
            f"rows are to be excluded by {name} {list(values)}, but {store.path} has no column "
            f"{name!r}: {mend} for this store"
        )
    column = store.columns[name]
    kind = str if column.dtype == STRING else int
    wrong = [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]
    if column.shape or column.is_float or wrong:
        raise StoreError(
            f"rows are to be excluded by {name} {list(values)}, but column {name!r} of "
            f"{store.path} has rows of shape {column.shape} and dtype {column.dtype}: rules name "
            "whole numbers, or strings of a column of strings, one a row"
        )
    if kind is int:
        return list(values)
    known = {string: i for i, string in enumerate(store.strings(name))}
    return [known.get(v, -1) for v in values]


def _check_known(store: Store | Part, name: str, values: Sequence[Any]) -> None:
    """Refuses a rule that names a string which no row has: it is misspelt."""
    column = store.columns.get(name)
    strings = store.strings(name) if column is not None and column.dtype == STRING else ()
    for value in (v for v in values if strings and v not in strings):
        near = difflib.get_close_matches(str(value), strings[:10_000], n=3) or strings[:3]
        raise StoreError(
            f"rows are to be excluded by {name} {value!r}, but no row of {store.path} has it; "
            f"there are {len(strings)} strings, among them {', '.join(map(ascii, near))}"
        )


def _within(
    store: Store | Part, site: str, max_norm: float, mask: np.ndarray | None, info: dict
) -> np.ndarray:
    """The rows of the mask whose norm at a site is no outlier; says in `info` what goes."""
    name = site + NORM
    if name not in store.columns:
        raise StoreError(
            f"rows are to be excluded by the norm of {site!r}, but {store.path} has no column "
            f"{name!r}: harvest with harvest.norms=True, or set stream.max_norm=0"
        )
    norms = store.read(name)
    limit = norm_limit(norms, max_norm)
    mask, info[f"rows_excluded_by_{name}"] = _narrow(mask, norms <= limit)
    info[f"max_{name}"] = float(limit)
    return mask


def norm_limit(norms: np.ndarray, max_norm: float) -> np.float32:
    """The largest norm of a row that is streamed, by the norms [rows] of all rows of a store."""
    return np.float32(max_norm * np.median(norms)) if len(norms) else np.float32(0)


def _narrow(mask: np.ndarray | None, keep: np.ndarray) -> tuple[np.ndarray, int]:
    """The rows of both, and how many of the first are not in the second."""
    if mask is None:
        return keep, len(keep) - int(keep.sum())
    both = mask & keep
    return both, int(mask.sum()) - int(both.sum())
