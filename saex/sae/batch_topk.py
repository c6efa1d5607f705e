"""BatchTopK SAE (Bussmann, Leask, Nanda 2024, arXiv 2412.06410)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops, selection
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class BatchTopK:
    """p = (x - b_dec) W_enc^T + b_enc; f = relu(p) where it is among a batch's b k largest.

    So rows have k active latents on average. x_hat = f W_dec + b_dec. At inference f = p where
    p > threshold: one threshold for all latents, the running mean of the smallest kept value (the
    paper's estimate; the mean starts at a sample's, so nothing is biased at the start). The batch
    is the global one, on any mesh. Values equal at the cut are all kept.

    Loss: s * MSE + aux_coefficient * AuxK, both as in ``TopK`` (the authors' code neither detaches
    the residual nor divides by its variance). Unit decoder rows, tied initialisation.

    Training looks for what is above a little less than the last batch's cut. Where that misses some
    of the batch's largest, or finds more than there is room for, the batch is done densely
    ("fallbacks" in the metrics): ``saex.sae.exact``.

    Fields:
      k: mean of active latents a row (a sweep's upper bound).
      capacity: room for what is found, in latents of a row, in the mean (on each device that holds
        latents); 0: always densely; None: 2 k, or densely where that is the faster way
        (``encode_above.room_for``).
      threshold_rate: weight of a batch in the running mean of the smallest kept value; that value
        falls as batches grow.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    capacity: int | None = None
    threshold_rate: float = 0.01
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
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
        selection.check_capacity(self.capacity, self.k)
        selection.check_rate(self.threshold_rate)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, and the threshold; stats as ``TopK``, and ``selection.STATS``."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["threshold"] = ArraySpec((), (), trainable=False, doc="of codes, in scaled units")
        stats = {**affine.stats_specs(self.n), **selection.STATS}
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``; the threshold at the cut of up to 512 rows of the sample."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        params = affine.match_norms(probe_key, params, self.k)
        params["threshold"] = selection.first_cut(params, x, self.k)
        return params, {**affine.stats(self.n, x), **selection.stats(params["threshold"])}

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
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])

        def objective(params, codes, cut):
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
            codes, y, aux_k, served = affine.decode_aux(params, x, codes, dead, *aux)
            mse = stats["mse_scale"] * losses.mse(x - y)
            metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served}
            metrics |= {**losses.figures(x, x - y, codes, dead), "cut": cut}
            lowest = selection.smallest(codes)
            return mse + hyper["aux_coefficient"] * aux_k, (metrics, after, y, lowest)

        how = hyper["k"], self.k, self.capacity, objective, self.matmul_dtype
        loss, metrics, after, y, lowest = selection.of_batch(params, stats, x, *how)
        threshold = selection.follow(params["threshold"], lowest, self.threshold_rate)
        metrics |= {"threshold": threshold}
        return loss, Out(metrics, after, y, {"threshold": threshold})

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state
