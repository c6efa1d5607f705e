"""What a dictionary is judged on: held-out activations, and text with the model that reads it."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from saex.evals.reconstructors import Reconstructor
from saex.evals.rows import Rows, thin


@dataclasses.dataclass(frozen=True, eq=False)
class Contexts:
    """Texts cut to the model's context length.

    tokens: int32 [contexts, t], anything beyond a context's length. lengths: int32 [contexts],
    tokens that count.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def stack(cls, chunks: Iterable[Any], at_most: int = 4096) -> "Contexts":
        """At most so many of ``saex.data.text.chunk``'s contexts, spread evenly over the text.

        Raises:
          ValueError: there are none.
        """
        kept = thin(chunks, at_most)
        if not kept:
            raise ValueError("no held-out text: give the text source more documents")
        return cls(
            np.stack([c.tokens for c in kept]).astype(np.int32),
            np.array([c.length for c in kept], np.int32),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Everything that an evaluation reads beside the dictionary.

    Fields:
      rows: held-out activations of the site.
      model, model_params: the subject model, or None: no cross-entropy then.
      contexts: held-out text for it.
      controls: reconstructors to score beside the dictionary, by name (``controls.fit``).
    """

    rows: Rows
    model: Any = None
    model_params: Any = None
    contexts: Contexts | None = None
    controls: Mapping[str, Reconstructor] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """float64 [d]: the mean of the held-out rows that count (of about 262144 of them)."""
        total, count = 0.0, 0
        for block in self.rows.blocks(262_144):
            total = total + block.x[block.kept].astype(np.float32).sum(axis=0, dtype=np.float64)
            count += int(block.kept.sum())
        if count == 0:
            raise ValueError(
                f"no held-out row is left without positions {self.rows.skip_positions} and tokens "
                f"{self.rows.skip_tokens}: skip less"
            )
        return np.asarray(total / count)

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, one sentence each."""
        rules = [
            f"{what} {', '.join(map(str, skipped))}"
            for what, skipped in (
                ("position", self.rows.skip_positions),
                ("token id", self.rows.skip_tokens),
            )
            if skipped
        ]
        if not rules:
            return []
        return [
            f"Left out: {'; '.join(rules)}. There the model keeps its own activation in every "
            "variant, and what it predicts from there is not scored."
        ]
