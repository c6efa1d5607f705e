"""saex's methods as ``experiments/methods`` sets them, through its own training step."""

from typing import Any

import numpy as np
from quality_libraries import PREFIXES, Data, Settings, Trained
from quality_weights import Weights, of_gated
from study import trained

from saex.sae import SAES

CLIP = {"topk": None, "batch_topk": None}  # else 0.01, as the configurations have it


def train(method: str, s: Settings, data: Data, value: float, lr: float, seed: int) -> Trained:
    """Rows go in raw: params hold their scale."""
    sae = dictionary(method, s, value)
    how = {"steps": s.steps, "lr": lr, "seed": seed, "clip": CLIP.get(method, 0.01)}
    params, _ = trained(sae, data.batches, sample=dict(data.sample), **how)
    data.done()

    def forward(x: np.ndarray) -> np.ndarray:
        return np.asarray(sae.decode(params, sae.encode(params, x), x))

    params = {name: np.asarray(v, np.float32) for name, v in params.items()}
    weights = _weights(method, params, s)
    scale = float(params["scale"])
    return Trained(weights.folded(scale, float(params.get("y_scale", scale))), forward)


def dictionary(method: str, s: Settings, value: float) -> Any:
    """With the penalty or k that is swept."""
    name = "skip_transcoder" if method == "transcoder" else method
    own = _own(method, s, value)
    return SAES[name](d_in=s.d, n=s.n, dead_after_tokens=s.dead_after, **own)


def _own(method: str, s: Settings, value: float) -> dict[str, Any]:
    if method in ("relu", "gated"):
        return {"l1": value, "l1_warmup_steps": max(s.steps // 20, 1)}
    if method == "jump_relu":
        short = {"bandwidth": 0.03, "threshold": 0.03}
        return {"l0": value, "l0_warmup_steps": s.steps // 2, **short}
    own: dict[str, Any] = {"k": round(value)}
    if method in ("batch_topk", "matryoshka"):
        own["threshold_rate"] = 0.02
    if method == "matryoshka":
        own["fractions"] = PREFIXES
    if method in ("transcoder", "skip_transcoder"):
        own |= {"d_out": s.d, "skip": method == "skip_transcoder"}
    return own


def _weights(method: str, p: dict[str, np.ndarray], s: Settings) -> Weights:
    shared = {"W_dec": p["W_dec"], "b_dec": p["b_dec"], "b_in": p["b_dec"]}
    if method == "gated":
        return of_gated(p["W_enc"], p["b_enc"], p["r_mag"], p["b_mag"], **shared)
    if method in ("relu", "transcoder", "skip_transcoder"):
        shared["b_in"] = np.zeros(s.d, np.float32)  # nothing is taken from x
    if method in ("topk", "transcoder", "skip_transcoder"):
        shared |= {"k": s.l0, "W_skip": p.get("W_skip")}
    else:
        shared["threshold"] = _threshold(p, s.n)
    return Weights(W_enc=p["W_enc"], b_enc=p["b_enc"], **shared)


def _threshold(p: dict[str, np.ndarray], n: int) -> np.ndarray:
    if "log_threshold" in p:
        return np.exp(p["log_threshold"])
    return np.broadcast_to(p.get("threshold", np.float32(0)), (n,))
