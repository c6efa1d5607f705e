"""SAELens' training classes through its own ``SAETrainer.fit``, and what it saves for inference.

Rows are scaled to mean squared norm d, which its ``expected_average_only_in`` aims at; warm-ups of
penalties take 5% of the run, as in its tutorials; all else is its default (decoder rows of norm 0.1
at the start, auxiliary loss 1, gradient norm clipped at 1, bandwidth 0.05, threshold from 0.01).
"""

import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from quality_libraries import PREFIXES, Data, Settings, Trained, array, no_grad, peer
from quality_weights import Weights, of_gated

CLASSES = {
    "relu": "StandardTrainingSAE",
    "gated": "GatedTrainingSAE",
    "jump_relu": "JumpReLUTrainingSAE",
    "topk": "TopKTrainingSAE",
    "batch_topk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}


def train(method: str, s: Settings, data: Data, value: float, lr: float, seed: int) -> Trained:
    """One run; thresholds are those of the JumpReLU that it saves BatchTopK and Matryoshka as."""
    torch, scale = peer("torch"), data.scales["x"] * s.d**0.5
    torch.manual_seed(seed)
    sae = _sae(method, s, value)

    def provider() -> Iterator[Any]:
        for step in range(s.steps):
            yield torch.from_numpy(data.batches(step)["x"] * np.float32(scale))

    peer("sae_lens.training.sae_trainer").SAETrainer(_config(s, lr), sae, provider()).fit()
    data.done()
    saved = _as_saved(sae)
    return Trained(_weights(method, saved, s).folded(scale, scale), no_grad(saved, scale, scale))


def _sae(method: str, s: Settings, value: float) -> Any:
    lens, warm = peer("sae_lens"), max(s.steps // 20, 1)
    own: dict[str, Any] = {"k": float(value)}
    if method in ("relu", "gated"):
        own = {"l1_coefficient": value, "l1_warm_up_steps": warm}
    elif method == "jump_relu":
        own = {"l0_coefficient": value, "l0_warm_up_steps": warm}
    elif method == "topk":
        own = {"k": round(value)}
    elif method == "matryoshka":
        own["matryoshka_widths"] = [int(total * s.n) for total in itertools.accumulate(PREFIXES)]
    config = getattr(lens, CLASSES[method] + "Config")
    return getattr(lens, CLASSES[method])(config(d_in=s.d, d_sae=s.n, **own))


def _config(s: Settings, lr: float) -> Any:
    return peer("sae_lens.config").SAETrainerConfig(
        total_training_samples=s.steps * s.batch,
        train_batch_size_samples=s.batch,
        lr=lr,
        lr_end=lr / 10,  # asked for and not used: a constant rate decays to 0
        lr_warm_up_steps=s.warmup,
        lr_decay_steps=s.decay,
        dead_feature_window=max(s.dead_after // s.batch, 1),
    )


def _as_saved(sae: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return peer("sae_lens").SAE.load_from_disk(folder)


def _weights(method: str, sae: Any, s: Settings) -> Weights:
    b_dec = array(sae.b_dec)
    shared: dict[str, Any] = {"W_dec": array(sae.W_dec), "b_dec": b_dec, "b_in": b_dec}
    if not sae.cfg.apply_b_dec_to_input:
        shared["b_in"] = np.zeros_like(b_dec)
    W_enc = array(sae.W_enc.T)
    if method == "gated":
        return of_gated(W_enc, array(sae.b_gate), array(sae.r_mag), array(sae.b_mag), **shared)
    if method == "topk":
        shared["k"] = s.l0
    elif method == "relu":
        shared["threshold"] = np.zeros(s.n, np.float32)
    else:
        shared["threshold"] = array(sae.threshold)
    return Weights(W_enc=W_enc, b_enc=array(sae.b_enc), **shared)
