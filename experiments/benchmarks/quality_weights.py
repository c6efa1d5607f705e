"""What every library's dictionary comes down to, and the one evaluator that scores it, in numpy.

All methods of ``quality.py`` are, at inference, the same function with another choice of latents:

    p = (x - b_in) W_enc^T + b_enc;  f = p where it is chosen;  y = f W_dec + b_dec (+ x W_skip^T)

chosen: above a threshold of each latent (at least 0), or among a row's k largest and above 0.
"""

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Weights:
    """W_enc [n, d], b_enc [n], b_in [d], W_dec [n, o], b_dec [o], W_skip [o, d]; threshold or k."""

    W_enc: Array
    b_enc: Array
    b_in: Array
    W_dec: Array
    b_dec: Array
    threshold: Array | None = None
    k: int | None = None
    W_skip: Array | None = None

    def folded(self, x_scale: float, y_scale: float) -> "Weights":
        """For raw rows, where these see x * x_scale and make y * y_scale."""
        skip = None if self.W_skip is None else self.W_skip * np.float32(x_scale / y_scale)
        return dataclasses.replace(
            self,
            W_enc=self.W_enc * np.float32(x_scale),
            b_in=self.b_in / np.float32(x_scale),
            W_dec=self.W_dec / np.float32(y_scale),
            b_dec=self.b_dec / np.float32(y_scale),
            W_skip=skip,
        )

    def codes(self, x: Array) -> Array:
        """[b, n] of rows [b, d]."""
        p = (x - self.b_in) @ self.W_enc.T + self.b_enc
        if self.k is None:
            return np.where(p > np.maximum(self.threshold, 0), p, 0)
        best = np.argpartition(p, -self.k, axis=1)[:, -self.k :]
        codes = np.zeros_like(p)
        values = np.maximum(np.take_along_axis(p, best, axis=1), 0)
        np.put_along_axis(codes, best, values, axis=1)
        return codes

    def decoded(self, x: Array, codes: Array) -> Array:
        """[b, o] from codes [b, n] and, for the linear path, the rows."""
        y = codes @ self.W_dec + self.b_dec
        return y if self.W_skip is None else y + x @ self.W_skip.T


def of_gated(W: Array, b_gate: Array, r_mag: Array, b_mag: Array, **others: Any) -> Weights:
    """A gated dictionary: exp(r_mag) s + b_mag where s + b_gate > 0, with s = (x - b_in) W^T."""
    grown = np.exp(r_mag)
    threshold = b_mag - grown * b_gate  # of the magnitude: where the gate opens
    return Weights(W_enc=grown[:, None] * W, b_enc=b_mag, threshold=threshold, **others)


def evaluate(weights: Weights, x: Array, y: Array, batch: int = 4096) -> dict[str, float]:
    """Scores on raw rows x, whose y shall be reconstructed, sums in float64.

    fvu: sum ||y - y'||^2 / sum ||y - mean||^2, pooled. cosine: mean over rows of cos(y, y').
    l0: mean of latents above 0. dead: share of latents that fire in none of the rows.
    """
    residual = active = cosine = 0.0
    fired = np.zeros(len(weights.b_enc), bool)
    for i in range(0, len(x), batch):
        codes, want = weights.codes(x[i : i + batch]), y[i : i + batch]
        got = weights.decoded(x[i : i + batch], codes)
        residual += np.sum(np.square(want - got, dtype=np.float64))
        norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
        cosine += np.sum(np.sum(want * got, axis=1) / np.maximum(norms, 1e-30), dtype=np.float64)
        active += np.count_nonzero(codes)
        fired |= codes.any(axis=0)
    centred = np.sum(np.square(y - y.mean(axis=0, dtype=np.float64)), dtype=np.float64)
    scores = {"fvu": residual / centred, "cosine": cosine / len(x), "l0": active / len(x)}
    return {name: float(v) for name, v in scores.items()} | {"dead": 1 - float(fired.mean())}


@dataclasses.dataclass(frozen=True, eq=False)
class InPlace:
    """A ``Reconstructor`` of saex.evals, for cross-entropy with the reconstruction in place."""

    weights: Weights
    l0: None = None

    def reconstruct(self, x: Any, tokens: Any) -> Array:
        """float32 [b, o] of raw rows [b, d]."""
        x = np.asarray(x, np.float32)
        return self.weights.decoded(x, self.weights.codes(x))
