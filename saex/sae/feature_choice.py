"""Feature Choice SAE: each latent picks its rows of a batch (Ayonrinde 2024, arXiv 2411.02124)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops, selection, zipf
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class FeatureChoice:
    """p = (x - b_dec) W_enc^T + b_enc; f_j = relu(p_j) in the m_j rows where p_j is largest.

    Rows of a batch, that is, the global one. The budgets m_j sum to k rows and follow the
    Zipf-Mandelbrot law of the latents' densities (``saex.sae.zipf``), so that no latent is left
    out. In the first ``choice_from`` of the run all pairs of row and latent compete, as in
    ``MutualChoice``: that is where densities come from; then the law is frozen and latents choose.
    Budgets below 1 are met on average, by one random draw a step. At inference f_j = relu(p_j)
    where p_j > threshold_j, the running mean of the latent's smallest chosen value: a JumpReLU SAE.
    x_hat = f W_dec + b_dec.

    Loss: s * MSE + aux_coefficient * aux_zipf, as in ``MutualChoice``, whose remark on the source
    holds here too: phases, law and thresholds are our reading. Chosen pairs below 0 are dropped.
    Where budgets are below 1 the thresholds lean low, and rows have more than k on held-out data.

    A step is dense, [b, n], and looks 31 times through the scores for the cuts.

    Fields:
      k: mean of active latents a row.
      choice_from: share of the run after which latents choose; 0: from the start, all alike.
      others: as in ``MutualChoice``.
    """

    d_in: int
    n: int
    k: int = 32
    choice_from: float = 0.8
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
        if not 0 <= self.choice_from <= 1:
            raise ValueError(f"choice_from={self.choice_from}: a share of the run, 0 to 1")
        selection.check_rate(self.threshold_rate)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, and a threshold a latent; stats as ``MutualChoice``."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        doc = "of its code, in scaled units"
        params["threshold"] = ArraySpec((self.n,), ("n",), trainable=False, doc=doc)
        stats = affine.stats_specs(self.n)
        return {"params": params, "stats": {**stats, **zipf.specs(self.n)}}

    def hyper(self) -> dict[str, float]:
        """k and the weight of aux_zipf."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``BatchTopK``, all thresholds alike."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        params = affine.match_norms(probe_key, params, self.k)
        params["threshold"] = jnp.full((self.n,), selection.first_cut(params, x, self.k))
        stats = affine.stats(self.n, x)
        return params, {**stats, **zipf.start(self.n, self.k)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d], by the thresholds."""
        p = affine.scores(params, affine.scaled(params, x), self.matmul_dtype)
        return DenseCodes(jnp.where(p > params["threshold"][None], jax.nn.relu(p), 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * aux_zipf of one global batch of raw rows."""
        x, rows = affine.scaled(params, batch["x"]), ops.rows_count(batch["x"])
        p = jax.nn.relu(affine.scores(params, x, self.matmul_dtype))
        since = step - jnp.ceil(self.choice_from * hyper["steps"])  # latents choose from 0 on
        cuts = self._cuts(jax.lax.stop_gradient(p), stats["law"], key, since >= 0, hyper["k"])
        codes = DenseCodes(jnp.where(p >= cuts[None], p, 0))
        after, dead = affine.tally(stats, codes, rows, self.dead_after_tokens)
        after = zipf.count(after, codes, rows, self.density_rows)
        few = zipf.underused(after, dead, self.underused, self.density_rows)
        aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
        codes, y, aux_zipf, served = affine.decode_aux(params, x, codes, few, *aux)
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "aux_zipf": aux_zipf, "aux_served": served}
        metrics |= {**losses.figures(x, x - y, codes, dead), "underused": losses.share(few)}
        due = (since < 0) & (step % self.law_every == 0) & zipf.settled(after, self.density_rows)
        # what the common cut has left in the thresholds goes with the first choice
        rate = jnp.maximum(self.threshold_rate, jnp.where(since >= 0, 1 / (1 + jnp.abs(since)), 0))
        threshold = selection.follow(jax.lax.stop_gradient(params["threshold"]), cuts, rate)
        total = mse + hyper["aux_coefficient"] * aux_zipf
        return total, Out(metrics, zipf.refresh(after, due), y, {"threshold": threshold})

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _cuts(self, p: Any, law: Any, key: Any, choosing: Any, k: Any) -> Any:
        """From which value on each latent keeps a row: its own cut, or the whole batch's."""
        rows = ops.rows_count(p)
        shift = 0.5 if key is None else jax.random.uniform(key)

        def own(p):
            return selection.column_cuts(p, zipf.budgets(law, k * rows, shift, rows))

        def common(p):
            return selection.batch_cut(k * rows, p) + jnp.zeros_like(law)

        return jax.lax.cond(choosing, own, common, p)
