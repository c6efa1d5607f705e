"""From a dictionary and held-out rows to what a page says about its latents."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from saex.evals.density import Counts, Histogram, histogram
from saex.evals.heldout import HeldOut
from saex.report import choose
from saex.report.scan import Scan, decoder_rows, scan, values_at
from saex.report.text import Text
from saex.report.tokens import byte_text


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
    text = Text(heldout.rows)
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


def _examples(
    sae: Any,
    params: Any,
    text: Text,
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
    residual = not heldout.rows.predicted.endswith("mlp_in") and "+" not in heldout.rows.site
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
