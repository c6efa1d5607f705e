"""Which rows are streamed: rules on positions and tokens, resolved before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saex.data.manifest import StoreError
from saex.data.split import Part
from saex.data.store import Store

POSITION, TOKENS = "position", "tokens"
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

    def places(self, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """Where the kept rows are when these ranges are read one behind the other, int64."""
        if self.mask is None:
            return np.arange(sum(b - a for a, b in ranges))
        return np.flatnonzero(np.concatenate([self.mask[a:b] for a, b in ranges]))


def resolve(store: Store | Part, positions: Sequence[int], tokens: Sequence[int]) -> Kept:
    """Applies the rules to every row of the store.

    Args:
      store: its columns `position` and `tokens` are read.
      positions: positions in the context that are left out. The default (0,) passes over a store
        without positions (rows that are not text); anything else needs the column.
      tokens: token ids that are left out.

    Raises:
      StoreError: a rule whose column the store does not have, or no row left.
    """
    chunks, rules = store.chunks(), {}
    if POSITION in store.columns or tuple(positions) != DEFAULT_POSITIONS:
        rules[POSITION] = tuple(positions)
    rules[TOKENS] = tuple(tokens)
    mask, info = _apply(store, {k: v for k, v in rules.items() if v})
    counts = chunks[:, 1] - chunks[:, 0]
    if mask is not None and len(chunks):
        counts = np.add.reduceat(mask, chunks[:, 0], dtype=np.int64)
    return Kept(chunks, counts, mask, {**info, "rows_kept": int(counts.sum())})


def _apply(
    store: Store | Part, rules: dict[str, tuple[int, ...]]
) -> tuple[np.ndarray | None, dict]:
    info: dict[str, Any] = {"rows": store.rows}
    mask = None
    for name, values in rules.items():
        if name not in store.columns:
            raise StoreError(
                f"rows are to be excluded by {name} {list(values)}, but {store.path} has no column "
                f"{name!r}: set stream.exclude_{name.rstrip('s')}s=() for this store"
            )
        hit = np.isin(store.read(name), values)
        before = store.rows if mask is None else int(mask.sum())
        mask = ~hit if mask is None else mask & ~hit
        info[f"rows_excluded_by_{name}"] = before - int(mask.sum())
        info[f"excluded_{name}"] = list(values)
    return mask, info
