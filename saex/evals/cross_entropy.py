"""Does the subject model still work when the reconstruction stands in the activation's place?"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saex.evals.heldout import HeldOut
from saex.evals.reconstructors import Constant, OfDictionary, Reconstructor
from saex.evals.rows import Rows, evenly, keep
from saex.models.transformer import Edit


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Nats per predicted token of held-out text, with the site left alone and replaced.

    What is replaced is the site, or the target that a transcoder predicts from it. Rows of several
    sites, or of no site of the model, have no such number.

    Positions that the dictionary does not see (``Rows.skip_*``) keep their own activation in every
    variant, ablations too, and what is predicted from there is not scored; nor is padding.

    Metrics:
      ce_clean, ce_reconstructed, ce_mean_ablated, ce_zero_ablated: mean cross-entropy; the mean is
        that of the held-out rows.
      ce_increase: ce_reconstructed - ce_clean.
      loss_recovered: (ce_zero_ablated - ce_reconstructed) / (ce_zero_ablated - ce_clean), means
        first, then one ratio; loss_recovered_mean: the same with ce_mean_ablated, which flatters
        less. NaN where an ablation costs nothing.
      kl: mean KL(clean || reconstructed) of the next-token distributions, at all scored positions
        and the last one.
      tokens: predicted tokens that were scored.

    Fields:
      contexts: about how many contexts are read, evenly spread, where there are more.
      batch: contexts a program run; a few stay in a CPU's cache.
    """

    contexts: int = 256
    batch: int = 4

    def run(self, sae: Any, params: Any, heldout: HeldOut) -> dict[str, float]:
        """The metrics and, under ``<control>.``, those of each control; {} without a model."""
        if heldout.model is None or heldout.text is None or not heldout.editable:
            return {}
        if not {heldout.rows.site, heldout.rows.predicted} <= set(heldout.model.sites):
            return {}
        variants = {
            "": OfDictionary(sae, params),
            "mean": Constant(heldout.mean),
            "zero": Constant(np.zeros_like(heldout.mean)),
            **{f"{name}.": control for name, control in heldout.controls.items()},
        }
        nats, kl, tokens = self.score(variants, heldout)
        clean, mean, zero = nats["clean"], nats["mean"], nats["zero"]
        out = {"ce_clean": clean, "ce_mean_ablated": mean, "ce_zero_ablated": zero}
        for name in [v for v in variants if v not in ("mean", "zero")]:
            out |= {
                f"{name}ce_reconstructed": nats[name],
                f"{name}ce_increase": nats[name] - clean,
                f"{name}loss_recovered": _recovered(zero, nats[name], clean),
                f"{name}loss_recovered_mean": _recovered(mean, nats[name], clean),
                f"{name}kl": kl[name],
            }
        return {**out, "tokens": float(tokens)}

    def score(
        self, variants: Mapping[str, Reconstructor], heldout: HeldOut
    ) -> tuple[dict[str, float], dict[str, float], int]:
        """(nats per token, KL per position, tokens): by variant, and "clean" in the first."""
        model, site, target = heldout.model, heldout.rows.site, heldout.rows.predicted
        weights = jax.tree.map(jnp.asarray, heldout.model_params)
        nats, kl = dict.fromkeys(["clean", *variants], 0.0), dict.fromkeys(variants, 0.0)
        predicted, positions = 0, 0
        for tokens, seen, scored in self._batches(heldout):
            log_p, x, y, losses = _clean(model, site, target, weights, tokens)
            nats["clean"] += _total(losses, scored)
            rows, ids = x.reshape(-1, x.shape[-1]), tokens.reshape(-1)
            for name, variant in variants.items():
                new = variant.reconstruct(rows, ids)
                losses, divergence = _replaced(model, target, weights, tokens, y, new, seen, log_p)
                nats[name] += _total(losses, scored)
                kl[name] += _total(divergence, seen)
            predicted, positions = predicted + int(scored.sum()), positions + int(seen.sum())
        if predicted == 0:
            raise ValueError("no token of the held-out contexts is scored: skip fewer positions")
        return (
            {name: total / predicted for name, total in nats.items()},
            {name: total / positions for name, total in kl.items()},
            predicted,
        )

    def _batches(self, heldout: HeldOut) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens [b, t], seen [b, t]: the dictionary sees them, scored [b, t - 1])."""
        texts = heldout.text
        assert texts is not None
        picked = evenly(len(texts.tokens), min(self.contexts, len(texts.tokens)))
        for i in range(0, len(picked), self.batch):
            part = picked[i : i + self.batch]
            missing = self.batch - len(part)
            tokens = np.pad(texts.tokens[part], ((0, missing), (0, 0)))
            lengths = np.pad(texts.lengths[part], (0, missing))
            real = np.arange(tokens.shape[1])[None] < lengths[:, None]
            seen = real & _seen(tokens, heldout.rows)
            if texts.seen is not None:
                seen &= np.pad(texts.seen[part], ((0, missing), (0, 0)))
            yield tokens, seen, seen[:, :-1] & real[:, 1:]


def _seen(tokens: np.ndarray, rows: Rows) -> np.ndarray:
    """Bool [b, t]: positions that the rules on positions and tokens leave in."""
    b, t = tokens.shape
    places = keep(np.arange(t), rows.skip_positions, t)
    return keep(tokens.reshape(-1), rows.skip_tokens, b * t).reshape(b, t) & places[None]


def _total(values: jax.Array, mask: np.ndarray) -> float:
    return float(np.asarray(values, np.float64)[mask].sum())


def _recovered(ablated: float, reconstructed: float, clean: float) -> float:
    return (ablated - reconstructed) / (ablated - clean) if ablated != clean else float("nan")


def _put(x: Any, new: Any) -> Any:
    return new


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _clean(model: Any, site: str, target: str, params: Any, tokens: Any) -> tuple:
    """(log p [b, t, v], the site's activations [b, t, d], the target's, nats [b, t - 1])."""
    logits, taps = model.run(params, tokens, taps=tuple({site: 0, target: 0}))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return log_p, taps[site], taps[target], _nats(log_p, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replaced(
    model: Any, target: str, params: Any, tokens: Any, y: Any, new: Any, seen: Any, log_p: Any
) -> tuple[Any, Any]:
    """(nats [b, t - 1], KL from log_p [b, t]) with ``new`` [b * t, d] at the seen positions.

    The edit does not read what it replaces, so XLA drops all that only leads to it: the model
    before the target is computed once, by ``_clean``, however many variants there are.
    """
    new = jnp.where(seen[..., None], new.reshape(y.shape).astype(y.dtype), y)
    logits, _ = model.run(params, tokens, edits={target: Edit(_put, (new,))})
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return _nats(log_q, tokens), jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _nats(log_p: Any, tokens: Any) -> Any:
    return -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
