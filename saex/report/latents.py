"""From a dictionary and held-out rows to what a page says about its latents."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from saex.evals.density import Counts, Histogram, histogram
from saex.evals.heldout import MOST, HeldOut, context_starts
from saex.evals.rows import Rows, keep
from saex.report import choose
from saex.report.scan import Scan, decoder_rows, scan, values_at
from saex.report.tokens import byte_text

BEFORE, AFTER = 32, 15  # tokens shown around the peak


@dataclasses.dataclass(frozen=True)
class Example:
    """One context. tokens and values: text and activation, one each; peak: the largest one's place.

    where: words for the place in the data. cut: whether the context goes on (before, behind).
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    where: str
    cut: tuple[bool, bool] = (False, False)


@dataclasses.dataclass(frozen=True)
class Latent:
    """One latent. why: the group it was chosen from. density: share of rows in which it fires.

    mean, largest: |activation| where it fires. examples: top contexts. promoted, suppressed: next
    tokens and what the decoder row adds to their logits.
    """

    index: int
    why: str
    density: float
    mean: float
    largest: float
    examples: tuple[Example, ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """latents: those chosen. histogram: of all latents. rows: how many rows were read."""

    latents: tuple[Latent, ...]
    histogram: Histogram
    rows: int


def study(
    sae: Any,
    params: Any,
    heldout: HeldOut,
    latents: int = 24,
    contexts: int = 8,
    rows: int = 262_144,
    token_text: Callable[[int], str] = byte_text,
) -> Study:
    """Choose latents and find their top contexts, in one pass over held-out rows.

    Args:
      sae: the dictionary.
      params: its arrays, on any mesh.
      heldout: rows; columns tokens, position and document are used where there are any. A model
        whose params hold ``unembed`` and ``final_norm`` gives promoted and suppressed next tokens.
      latents: how many to show.
      contexts: top contexts of each.
      rows: about how many rows to read, evenly spread.
      token_text: token id -> text; the default is that of bytes.

    Raises:
      StoreError: the site's rows have another width than the dictionary.
    """
    text = _Text(heldout.rows)
    found = scan(sae, params, heldout.rows, text.starts, rows, 2 * contexts)
    clear = choose.clearness(
        found, text.at("document", found.where), text.pairs(found.where), contexts
    )
    chosen = choose.choose(found, clear, latents, contexts)
    numbers = [c.latent for c in chosen]
    examples = _examples(sae, params, text, found, numbers, contexts, token_text)
    promoted = _next_tokens(sae, params, heldout, numbers, token_text)
    shown = [
        Latent(
            j,
            c.why,
            float(found.density[j]),
            float(found.mean[j]),
            float(found.top[j, 0]),
            tuple(examples[j]),
            *promoted[i],
        )
        for i, (j, c) in enumerate(zip(numbers, chosen))
    ]
    return Study(tuple(shown), histogram(Counts(found.fired, found.rows)), found.rows)


class _Text:
    """The integer columns of a store's first ``MOST`` rows, in memory."""

    def __init__(self, rows: Rows):
        self.rows, store = rows, rows.store
        stop = min(store.rows, MOST)
        names = [n for n in ("document", "position", "tokens") if n in store.columns]
        self.columns = {n: store.read(n, 0, stop).astype(np.int32) for n in names}
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
        return position & keep(self.at("tokens", at), self.rows.skip_tokens, len(at))

    def place(self, row: int) -> str:
        """Where a row comes from, in words."""
        found = [
            f"{n} {self.columns[n][row]:,}" for n in ("document", "position") if n in self.columns
        ]
        return ", ".join(found) or f"row {row:,}"


def _examples(
    sae: Any,
    params: Any,
    text: _Text,
    found: Scan,
    latents: list[int],
    contexts: int,
    token_text: Callable[[int], str],
) -> dict[int, list[Example]]:
    """Top contexts by latent; of contexts that read the same, the first."""
    spans = []
    for latent in latents:
        seen = set()
        for peak in map(int, found.where[latent][found.top[latent] > 0]):
            start, stop, cut = text.window(peak)
            words = text.columns["tokens"][start:stop].tobytes() if text.readable else peak
            if words not in seen and len(seen) < contexts:
                seen.add(words)
                spans.append((latent, peak, start, stop, cut))
    out: dict[int, list[Example]] = {latent: [] for latent in latents}
    if not spans:
        return out
    at = np.concatenate([np.arange(start, stop) for _, _, start, stop, _ in spans])
    owners = np.repeat([s[0] for s in spans], [s[3] - s[2] for s in spans])
    values = np.where(text.counts(at), values_at(sae, params, text.rows, at, owners), 0)
    offset = 0
    for latent, peak, start, stop, cut in spans:
        part = tuple(float(v) for v in values[offset : offset + stop - start])
        offset += stop - start
        words = (f"row {peak:,}",)
        if text.readable:
            words = tuple(token_text(int(t)) for t in text.columns["tokens"][start:stop])
        out[latent].append(Example(words, part, peak - start, text.place(peak), cut))
    return out


def _next_tokens(
    sae: Any,
    params: Any,
    heldout: HeldOut,
    latents: list[int],
    token_text: Callable[[int], str],
    top: int = 8,
) -> list[tuple[tuple, tuple]]:
    """(promoted, suppressed) of each latent: its decoder row through the model's unembedding.

    The final norm's scale is per row and left out; logits are compared with their mean over the
    vocabulary, which the softmax does not see.
    """
    weights = heldout.model_params
    residual = not heldout.rows.site.endswith("mlp_in")
    if not latents or not residual or not _can_unembed(weights):
        return [((), ())] * len(latents)
    unembed = np.asarray(weights["final_norm"])[:, None] * np.asarray(weights["unembed"])
    logits = decoder_rows(sae, params, latents) @ unembed
    logits = logits - logits.mean(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1)

    def named(row: int, ids: np.ndarray) -> tuple[tuple[str, float], ...]:
        return tuple((token_text(int(i)), float(logits[row, i])) for i in ids)

    return [(named(i, o[:top]), named(i, o[::-1][:top])) for i, o in enumerate(order)]


def _can_unembed(weights: Any) -> bool:
    return isinstance(weights, dict) and "unembed" in weights and "final_norm" in weights
