"""TopK by saex, dictionary_learning and SAELens: each by its own trainer, on the same batches.

Every function takes (settings, batches, sample, seed) and returns ``Trained``. ``batches(step)``
gives float32 rows [batch, d] whose mean squared norm is 1; ``sample`` is the first 32,768 of them.
Weights come back in one layout: W_enc [n, d], b_enc [n], W_dec [n, d], b_dec [d], meaning
relu(top_k((x - b_dec) W_enc^T + b_enc)) W_dec + b_dec.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

INSTALL = "see the header of quality_topk.py for the environment that has all three libraries"
Rows = np.ndarray
Batches = Callable[[int], Rows]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all libraries are given.

    Fields:
      d, n, k: width, latents, active latents. steps, batch: the budget. lr: Adam's peak rate.
      warmup, decay: steps of linear rise from 0 and of linear fall to 0.
      dead_after: rows without firing after which a latent is dead, in rows.
    """

    d: int
    n: int
    k: int
    steps: int
    batch: int
    lr: float
    warmup: int
    decay: int
    dead_after: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """weights: see above. forward: the library's own reconstruction of rows, to compare with."""

    weights: dict[str, np.ndarray]
    forward: Callable[[Rows], Rows]


def saex_topk(s: Settings, batches: Batches, sample: Rows, seed: int) -> Trained:
    """saex: AuxK 1/32, k_aux d/2, geometric median of the sample, encoder scaled at the start."""
    import jax

    from saex.sae import TopK
    from saex.sharding import MeshConfig, make_mesh
    from saex.train.optim import Optim
    from saex.train.state import init_state
    from saex.train.step import hyper_arrays, make_step

    sae = TopK(d_in=s.d, n=s.n, k=s.k, dead_after_tokens=s.dead_after, normalize="none")
    optim = Optim(lr=s.lr, warmup=s.warmup / s.steps, decay=s.decay / s.steps)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state = init_state(sae, optim.transformation(), key, {"x": sample}, mesh, "tp")
        step_fn, hyper = make_step(sae, optim, s.steps), hyper_arrays(sae, optim, s.steps)
        place = jax.NamedSharding(mesh, jax.P("data"))
        for step in range(s.steps):
            batch = {"x": jax.device_put(batches(step), place)}
            state, out = step_fn(state, batch, jax.random.key(seed), hyper)
    if not bool(out["finite"]):
        raise RuntimeError(f"saex, seed {seed}: not finite at the end")
    params = jax.device_get(state.params)

    def forward(x: Rows) -> Rows:
        return np.asarray(sae.decode(params, sae.encode(params, x)))

    return Trained({name: params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, forward)


def dictionary_learning_topk(s: Settings, batches: Batches, sample: Rows, seed: int) -> Trained:
    """dictionary_learning's TopKTrainer.update: AuxK 1/32, k_aux d/2, geometric median of the
    first batch, unit rows tied at the start, gradient norm clipped at 1, Adam's eps 1e-8.
    """
    torch, trainers = _peer("torch"), _peer("dictionary_learning.trainers.top_k")
    trainer = trainers.TopKTrainer(
        steps=s.steps,
        activation_dim=s.d,
        dict_size=s.n,
        k=s.k,
        layer=0,
        lm_name="store",
        lr=s.lr,
        warmup_steps=s.warmup,
        decay_start=s.steps - s.decay,
        seed=seed,
        device="cpu",
    )
    trainer.dead_feature_threshold = s.dead_after  # its own 10M rows are more than the whole run
    for step in range(s.steps):
        trainer.update(step, torch.from_numpy(batches(step)))
    ae = trainer.ae
    weights = {
        "W_enc": ae.encoder.weight,
        "b_enc": ae.encoder.bias,
        "W_dec": ae.decoder.weight.T,
        "b_dec": ae.b_dec,
    }
    return Trained(_numpy(weights), _no_grad(ae))


def sae_lens_topk(
    s: Settings, batches: Batches, sample: Rows, seed: int, scale: float = 1.0
) -> Trained:
    """SAELens' SAETrainer.fit of a TopKTrainingSAE: auxiliary loss 1 on d/2 dead latents, b_dec
    from 0, decoder rows of norm 0.1 and free, selection by activation times row norm, gradient
    norm clipped at 1. ``scale`` multiplies its inputs and is folded into the weights again.
    """
    torch, lens = _peer("torch"), _peer("sae_lens")
    config = _peer("sae_lens.config").SAETrainerConfig(
        total_training_samples=s.steps * s.batch,
        train_batch_size_samples=s.batch,
        lr=s.lr,
        lr_end=s.lr / 10,  # asked for and not used: a constant rate decays to 0
        lr_warm_up_steps=s.warmup,
        lr_decay_steps=s.decay,
        dead_feature_window=max(s.dead_after // s.batch, 1),
    )
    torch.manual_seed(seed)
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=s.d, d_sae=s.n, k=s.k))

    def provider() -> Iterator[Any]:
        for step in range(s.steps):
            yield torch.from_numpy(batches(step) * np.float32(scale))

    trainer = _peer("sae_lens.training.sae_trainer").SAETrainer(config, sae, provider())
    trainer.fit()
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(scale)
    norms = sae.W_dec.norm(dim=-1)
    weights = {
        "W_enc": (sae.W_enc * norms).T,
        "b_enc": sae.b_enc * norms,
        "W_dec": sae.W_dec / norms[:, None],
        "b_dec": sae.b_dec,
    }
    return Trained(_numpy(weights), _no_grad(sae))


def sae_lens_sqrt_d_topk(s: Settings, batches: Batches, sample: Rows, seed: int) -> Trained:
    """The same with rows scaled to mean squared norm d, which SAELens' own scaling aims at."""
    return sae_lens_topk(s, batches, sample, seed, scale=s.d**0.5)


LIBRARIES = {
    "saex": saex_topk,
    "dictionary_learning": dictionary_learning_topk,
    "sae_lens": sae_lens_topk,
    "sae_lens_sqrt_d": sae_lens_sqrt_d_topk,
}
PACKAGES = {
    "saex": ("saex", "jax"),
    "dictionary_learning": ("dictionary-learning", "torch"),
    "sae_lens": ("sae-lens", "torch"),
    "sae_lens_sqrt_d": ("sae-lens", "torch"),
}


def version(library: str) -> str:
    """The versions a library's result depends on."""
    return " ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES[library])


def _peer(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another build raises RuntimeError, not ImportError
        raise SystemExit(f"cannot import {module} ({error}): {INSTALL}") from error


def _numpy(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().astype(np.float32).copy() for k, v in weights.items()}


def _no_grad(module: Any) -> Callable[[Rows], Rows]:
    torch = _peer("torch")

    def forward(x: Rows) -> Rows:
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    return forward
