"""AbsTopK SAE: the k largest pre-activations by size, signs kept (arXiv 2510.00404)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops, selection
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class AbsTopK:
    """f = the k entries of (x - b_dec) W_enc^T + b_enc of largest size; x_hat = f W_dec + b_dec.

    Loss: half the squared distance, mean over rows (Zhu, Khalili, Zhu 2025); no AuxK, which takes
    positive pre-activations. Taking b_dec from the input, unit decoder rows and the tied start are
    ours; the source does not name its own.

    Fields:
      d_in: activation width. n: latents. k: active latents a row (a sweep's upper bound).
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      normalize, b_dec_init, matmul_dtype: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; stats: rows since each latent fired."""
        stats = {"since_fired": ArraySpec((self.n,), ("n",), "int32")}
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k, which a sweep may vary."""
        return {"k": float(self.k)}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Unit rows, tied; b_dec at the sample's centre."""
        params, _ = affine.init_tied(key, sample["x"], self.n, self.normalize, self.b_dec_init)
        params["W_enc"] = params["W_dec"] + 0
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Signed sparse codes [b, k] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x), self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Half the squared distance, mean over the rows of one global batch."""
        x = affine.scaled(params, batch["x"])
        chosen = self._encode(jax.lax.stop_gradient(params), x, hyper["k"])
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y = affine.decode_chosen(params, x, chosen)
        y = y + params["b_dec"][None]
        mse = losses.mse(x - y)
        metrics = {"mse": mse, **losses.figures(x, x - y, codes, dead)}
        return 0.5 * self.d_in * mse, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encode(self, params: Params, x: Any, k: Any) -> SparseCodes:
        weights = params["b_dec"], params["W_enc"], params["b_enc"]
        p = pre_activations(x, *weights, self.matmul_dtype)
        indices, kept = selection.largest(jnp.abs(p), self.k, k)
        values = jnp.where(kept, jnp.take_along_axis(p, indices, axis=1), 0)
        return affine.used_slots(values, indices)
