"""dictionary_learning's trainers, their ``update`` and their dictionaries' own inference.

Rows are scaled to mean squared norm 1, as its training loop does; penalties warm up over 20% of the
run, as in its demo. Set to the length of the run, as its own are longer than the whole: the age of
death, and when and how fast the threshold of BatchTopK and Matryoshka follows.
"""

from typing import Any

import numpy as np
from quality_libraries import PREFIXES, Data, Settings, Trained, array, no_grad, peer
from quality_weights import Weights, of_gated

TRAINERS = {
    "relu": ("standard", "StandardTrainerAprilUpdate"),
    "gated": ("gdm", "GatedSAETrainer"),
    "jump_relu": ("jumprelu", "JumpReluTrainer"),
    "topk": ("top_k", "TopKTrainer"),
    "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
}


def train(method: str, s: Settings, data: Data, value: float, lr: float, seed: int) -> Trained:
    """One run."""
    torch, scale = peer("torch"), data.scales["x"]
    torch.manual_seed(seed)  # JumpReluTrainer takes a seed and does not use it
    module, name = TRAINERS[method]
    make = getattr(peer(f"dictionary_learning.trainers.{module}"), name)
    trainer = make(**_shared(s, lr, seed), **_own(method, s, value))
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = s.dead_after
    for step in range(s.steps):
        trainer.update(step, torch.from_numpy(data.batches(step)["x"] * np.float32(scale)))
    data.done()
    weights = _weights(method, trainer.ae, s)
    return Trained(weights.folded(scale, scale), no_grad(trainer.ae, scale, scale))


def _shared(s: Settings, lr: float, seed: int) -> dict[str, Any]:
    return {
        "steps": s.steps,
        "activation_dim": s.d,
        "dict_size": s.n,
        "layer": 0,
        "lm_name": "store",
        "lr": lr,
        "warmup_steps": s.warmup,
        "decay_start": s.steps - s.decay,
        "seed": seed,
        "device": "cpu",
    }


def _own(method: str, s: Settings, value: float) -> dict[str, Any]:
    warm = {"sparsity_warmup_steps": max(s.steps // 5, 1)}
    if method in ("relu", "gated"):
        return {"l1_penalty": value, **warm}
    if method == "jump_relu":
        return {"target_l0": value, **warm}
    if method == "topk":
        return {"k": round(value)}
    own = {"k": round(value), "threshold_start_step": s.steps // 2, "threshold_beta": 0.98}
    return own | ({"group_fractions": list(PREFIXES)} if method == "matryoshka" else {})


def _weights(method: str, ae: Any, s: Settings) -> Weights:
    if method == "gated":
        b_dec = array(ae.decoder_bias)
        shared = {"W_dec": array(ae.decoder.weight.T), "b_dec": b_dec, "b_in": b_dec}
        biases = array(ae.gate_bias), array(ae.r_mag), array(ae.mag_bias)
        return of_gated(array(ae.encoder.weight), *biases, **shared)
    b_dec = array(ae.bias if method == "relu" else ae.b_dec)
    b_in = np.zeros_like(b_dec) if method == "jump_relu" else b_dec  # taken from x, or not
    threshold = None if method == "topk" else _threshold(method, ae, s.n)
    k = s.l0 if method == "topk" else None
    return Weights(*_encoder(ae), b_in, _decoder(ae), b_dec, threshold, k)


def _encoder(ae: Any) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(ae, "W_enc"):
        return array(ae.W_enc.T), array(ae.b_enc)
    return array(ae.encoder.weight), array(ae.encoder.bias)


def _decoder(ae: Any) -> np.ndarray:
    return array(ae.W_dec) if hasattr(ae, "W_dec") else array(ae.decoder.weight.T)


def _threshold(method: str, ae: Any, n: int) -> np.ndarray:
    if method == "relu":
        return np.zeros(n, np.float32)
    return np.broadcast_to(array(ae.threshold), (n,))
