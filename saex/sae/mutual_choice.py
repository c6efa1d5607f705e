"""Mutual Choice SAE: a batch's largest pairs, underused latents revived (arXiv 2411.02124)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops, selection, zipf
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class MutualChoice:
    """p = (x - b_dec) W_enc^T + b_enc; f = relu(p) where it is among a batch's b k largest.

    The selection, its room and the threshold at inference are ``BatchTopK``'s (found at the
    same time); what differs is the auxiliary loss of Ayonrinde 2024.

    Loss: s * MSE + aux_coefficient * aux_zipf. aux_zipf is ``TopK``'s AuxK with the underused
    latents in place of the dead ones: those dead, and those that fire less than ``underused`` times
    what a Zipf-Mandelbrot law, fitted to all latents' densities, gives to their rank
    (``saex.sae.zipf``). The paper's body was not to be had: that form is our reading of its
    abstract; with underused = 0 it is AuxK. Until ``density_rows`` rows are seen only dead ones
    count.

    Fields:
      underused: share of the law below which a latent is served; 0: dead ones alone.
      density_rows: memory of the densities, in rows. law_every: steps between fits of the law.
      others: as in ``BatchTopK``; k_aux of the underused latents may serve a row.
    """

    d_in: int
    n: int
    k: int = 32
    capacity: int | None = None
    threshold_rate: float = 0.01
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    underused: float = 0.5
    density_rows: int = 1_000_000
    law_every: int = 100
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ("threshold",)
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        zipf.check(self.underused, self.density_rows, self.law_every)
        selection.check_capacity(self.capacity, self.k)
        selection.check_rate(self.threshold_rate)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``BatchTopK``; stats also: ``zipf.specs``."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["threshold"] = ArraySpec((), (), trainable=False, doc="of codes, in scaled units")
        stats = {**affine.stats_specs(self.n), **selection.STATS}
        return {"params": params, "stats": {**stats, **zipf.specs(self.n)}}

    def hyper(self) -> dict[str, float]:
        """k and the weight of aux_zipf."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``BatchTopK``."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        params = affine.match_norms(probe_key, params, self.k)
        params["threshold"] = selection.first_cut(params, x, self.k)
        stats = {**affine.stats(self.n, x), **selection.stats(params["threshold"])}
        return params, {**stats, **zipf.start(self.n, self.k)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d], by the threshold."""
        p = affine.scores(params, affine.scaled(params, x), self.matmul_dtype)
        return DenseCodes(jnp.where(p > params["threshold"], jax.nn.relu(p), 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * aux_zipf of one global batch of raw rows."""
        x = affine.scaled(params, batch["x"])
        rows = ops.rows_count(x)

        def objective(params, codes, cut):
            after, dead = affine.tally(stats, codes, rows, self.dead_after_tokens)
            after = zipf.count(after, codes, rows, self.density_rows)
            few = zipf.underused(after, dead, self.underused, self.density_rows)
            aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
            codes, y, aux_zipf, served = affine.decode_aux(params, x, codes, few, *aux)
            mse = stats["mse_scale"] * losses.mse(x - y)
            metrics = {"mse": mse, "aux_zipf": aux_zipf, "aux_served": served, "cut": cut}
            metrics |= {**losses.figures(x, x - y, codes, dead), "underused": losses.share(few)}
            lowest = selection.smallest(codes)
            return mse + hyper["aux_coefficient"] * aux_zipf, (metrics, after, y, lowest)

        how = hyper["k"], self.k, self.capacity, objective, self.matmul_dtype
        loss, metrics, after, y, lowest = selection.of_batch(params, stats, x, *how)
        due = (step % self.law_every == 0) & zipf.settled(after, self.density_rows)
        threshold = selection.follow(params["threshold"], lowest, self.threshold_rate)
        metrics |= {"threshold": threshold}
        return loss, Out(metrics, zipf.refresh(after, due), y, {"threshold": threshold})

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state
