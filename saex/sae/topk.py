"""TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class TopK:
    """f = relu(top_k((x - b_dec) W_enc^T + b_enc)); x_hat = f W_dec + b_dec.

    Loss: s * MSE + aux_coefficient * AuxK, with s = 1 / variance of the sample per dimension, set
    once at initialisation, so that predicting the mean scores 1. Decoder rows have unit norm; the
    gradient along them is removed before the optimiser sees it. Tied at initialisation. The
    authors' Adam has eps 6.25e-10 (``optim.eps``, here 1e-8).

    Fields:
      d_in: activation width. n: latents. k: active latents a row (a sweep's upper bound).
      aux_coefficient: weight of AuxK (the paper's alpha). k_aux: dead latents that may serve a
        row; None: the power of two nearest to d_in / 2.
      dead_after_tokens: rows without firing after which a latent counts as dead.
      normalize: scale of the inputs. b_dec_init: where b_dec starts.
      matmul_dtype: inputs of matmuls; everything accumulates in float32.
    """

    d_in: int
    n: int
    k: int = 32
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux={self.k_aux}: at least 1; aux_coefficient=0 switches AuxK off")
        affine.check_dead_after(self.dead_after_tokens)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; stats: rows since each latent fired, and the loss scale s."""
        stats = affine.stats_specs(self.n)
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Tied rows, b_dec at the sample's centre, encoder scaled so that ||x_hat|| is ||x||."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        stats = affine.stats(self.n, x)
        return affine.match_norms(probe_key, params, self.k), stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x), self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        chosen = self._encode(jax.lax.stop_gradient(params), x, hyper["k"])
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux, served = affine.decode_aux(
            params, x, chosen, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "aux_k": aux, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        return mse + hyper["aux_coefficient"] * aux, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encode(self, params: Params, x: Any, k: Any) -> SparseCodes:
        values, indices = ops.select_topk(
            x, params["b_dec"], params["W_enc"], params["b_enc"], self.k, k, self.matmul_dtype
        )
        return affine.used_slots(jax.nn.relu(values), indices)
