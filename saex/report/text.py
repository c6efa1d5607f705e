"""The text that a store's rows come from, to show what surrounds a row."""

import numpy as np

from saex.evals.heldout import MOST, context_starts
from saex.evals.rows import Rows, keep

BEFORE, AFTER = 32, 15  # tokens shown around a peak


class Text:
    """The integer columns of a store's first ``MOST`` rows, in memory."""

    def __init__(self, rows: Rows):
        """Read document, position and tokens, those of them that the store has."""
        self.rows, store = rows, rows.store
        stop = min(store.rows, MOST)
        names = [n for n in ("document", "position", "tokens") if n in store.columns]
        self.columns = {n: store.read(n, 0, stop).astype(np.int32) for n in names}
        self.others = rows.counts(0, stop) if rows.skips_more else None
        self.starts = context_starts(store) if "position" in names else None
        self.readable = self.starts is not None and "tokens" in names

    def at(self, name: str, places: np.ndarray) -> np.ndarray | None:
        """A column at these rows; None where the store has no such column."""
        return self.columns[name][places] if name in self.columns else None

    def pairs(self, places: np.ndarray) -> np.ndarray | None:
        """The token before each row and its own, [..., 2]."""
        return self.at("tokens", np.stack([np.maximum(places - 1, 0), places], axis=-1))

    def window(self, peak: int) -> tuple[int, int, tuple[bool, bool]]:
        """(start, stop, what is cut off) around a row, within its context."""
        if not self.readable or self.starts is None:
            return peak, peak + 1, (False, False)
        i = int(np.searchsorted(self.starts, peak, "right"))
        first, end = int(self.starts[i - 1]), int(self.starts[i])
        # what is missing at one side of a short context is given to the other
        start = max(first, min(peak - BEFORE, end - BEFORE - AFTER - 1))
        stop = min(end, max(peak + AFTER + 1, start + BEFORE + AFTER + 1))
        return start, stop, (start > first, stop < end)

    def counts(self, at: np.ndarray) -> np.ndarray:
        """Bool: which of these rows are not left out."""
        position = keep(self.at("position", at), self.rows.skip_positions, len(at))
        others = self.others[at] if self.others is not None else True
        return position & keep(self.at("tokens", at), self.rows.skip_tokens, len(at)) & others

    def place(self, row: int) -> str:
        """Where a row comes from, in words."""
        found = [
            f"{n} {self.columns[n][row]:,}" for n in ("document", "position") if n in self.columns
        ]
        return ", ".join(found) or f"row {row:,}"
