"""What a dictionary is judged on: held-out activations, and text with the model that reads it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from saex.evals.reconstructors import Reconstructor
from saex.evals.rows import Rows

# Of larger stores, the contexts of so many first rows are used; a harvest shuffles contexts.
MOST = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """Texts cut to the model's context length.

    tokens: int32 [contexts, t], 0 beyond a context's length. lengths: int64 [contexts], tokens
    that count. seen: bool [contexts, t], those that the dictionary sees; None: all.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    seen: np.ndarray | None = None

    @classmethod
    def of(cls, rows: Rows) -> "Contexts":
        """The contexts that rows of a store come from, by its columns tokens and position."""
        starts = context_starts(rows.store)
        lengths, end = np.diff(starts), int(starts[-1])
        tokens = np.zeros((len(lengths), lengths.max(initial=0)), np.int32)
        real = np.arange(tokens.shape[1])[None] < lengths[:, None]
        tokens[real] = rows.store.read("tokens", 0, end)
        if not rows.skips_more:
            return cls(tokens, lengths)
        seen = np.zeros(tokens.shape, bool)
        seen[real] = rows.counts(0, end)
        return cls(tokens, lengths, seen)


def context_starts(store: Any) -> np.ndarray:
    """int64 [contexts + 1]: the row at which each context begins, and the end of the last.

    A context is a run of rows of one document whose positions count up.
    """
    rows = min(store.rows, MOST)
    position = store.read("position", 0, rows).astype(np.int64)
    new = np.ones(rows, bool)
    new[1:] = position[1:] != position[:-1] + 1
    if "document" in store.columns:
        document = store.read("document", 0, rows)
        new[1:] |= document[1:] != document[:-1]
    return np.append(np.flatnonzero(new), rows)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Everything that an evaluation reads beside the dictionary.

    Fields:
      rows: held-out activations of the site.
      model, model_params: the subject model, or None: no cross-entropy then.
      contexts: held-out text for it; by default that of the rows' store, where it has tokens.
      controls: reconstructors to score beside the dictionary, by name (``controls.fit``).
      shared: for ``evaluate``, whose evaluations are all of one dictionary: firing counts that
        another one has already found, by number of blocks.
    """

    rows: Rows
    model: Any = None
    model_params: Any = None
    contexts: Contexts | None = None
    controls: Mapping[str, Reconstructor] = dataclasses.field(default_factory=dict)
    shared: dict[int, Any] | None = None

    @property
    def editable(self) -> bool:
        """Whether the model takes edits; one whose forward is no JAX program is read only."""
        return getattr(self.model, "traceable", True)

    @functools.cached_property
    def text(self) -> Contexts | None:
        """``contexts``, or those of the rows' store; None where it has no tokens."""
        store = self.rows.store
        if self.contexts is None and {"tokens", "position"} <= set(store.columns):
            return Contexts.of(self.rows)
        return self.contexts

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """float64 [d]: mean of what shall be reconstructed, over about 262144 rows that count."""
        total, count = 0.0, 0
        for block in self.rows.blocks(262_144):
            total = total + block.y[block.kept].astype(np.float32).sum(axis=0, dtype=np.float64)
            count += int(block.kept.sum())
        if count == 0:
            raise ValueError(
                f"no held-out row is left without positions {self.rows.skip_positions}, tokens "
                f"{self.rows.skip_tokens}, {dict(self.rows.skip)} and norms beyond "
                f"{dict(self.rows.max_norms)}: skip less"
            )
        return np.asarray(total / count)

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, one sentence each."""
        rules = [
            f"{what} {', '.join(map(str, skipped))}"
            for what, skipped in (
                ("position", self.rows.skip_positions),
                ("token id", self.rows.skip_tokens),
                *self.rows.skip.items(),
            )
            if skipped
        ]
        rules += [
            f"{name} above {' or '.join(f'{limit:.4g}' for limit in limits)}"
            for name, limits in self.rows.max_norms.items()
        ]
        notes = []
        if rules:
            notes.append(f"Left out: {'; '.join(rules)}.")
        if rules and self.editable:
            notes[-1] += (
                " There the model keeps its own activation in every variant, and what it predicts "
                "from there is not scored."
            )
        if not self.editable:
            notes.append(
                "No cross-entropy (CE increase, loss recovered, KL): the subject model is run by "
                "its own framework, where saex reads but puts no reconstructions in. FVU, L0 and "
                "density are of held-out rows, as always."
            )
        return notes
