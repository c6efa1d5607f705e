"""Multi-TopK SAE: one dictionary for several k (Gao et al. 2024, arXiv 2406.04093)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import encode_topk
from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class MultiTopK:
    """``TopK`` whose codes degrade smoothly when more or fewer latents than k are kept.

    Loss: L(k) + wide_weight * L(wide * k) + aux_coefficient * AuxK with L(k) = s * MSE of the
    reconstruction by a row's k largest latents, s and AuxK (of the narrow residual) as in ``TopK``.
    The paper's L(k) + L(4k) / 8. Both sums share one selection of wide * k latents; the wide
    reconstruction is the narrow one plus the rest, so a step costs the sparse work of wide * k
    slots. Inference keeps k. Dead is what the narrow selection never uses.

    Fields:
      k: active latents a row at inference (a sweep's upper bound).
      wide: how many times k the wide sum keeps (at most all n). wide_weight: of its loss.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    wide: int = 4
    wide_weight: float = 1 / 8
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
        affine.check_dead_after(self.dead_after_tokens)
        if self.wide < 2:
            raise ValueError(f"wide={self.wide}: at least 2 (times k); for one k there is topk")
        if self.wide_weight < 0:
            raise ValueError(f"wide_weight={self.wide_weight}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``."""
        stats = affine.stats_specs(self.n)
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k (the wide sum follows it) and the weights of the wide sum and of AuxK."""
        weights = {"wide_weight": self.wide_weight, "aux_coefficient": self.aux_coefficient}
        return {"k": float(self.k), **weights}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        stats = affine.stats(self.n, x)
        return affine.match_norms(probe_key, params, self.k), stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        weights = affine.scaled(params, x), params["b_dec"], params["W_enc"], params["b_enc"]
        values, indices = ops.select_topk(*weights, self.k, self.k, self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Both sums and AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        narrow, rest = self._split(jax.lax.stop_gradient(params), x, hyper["k"])
        stats, dead = affine.tally(stats, narrow, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux, served = affine.decode_aux(
            params, x, narrow, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        _, more = affine.decode_chosen(params, x, rest)
        mse, wide = (stats["mse_scale"] * losses.mse(r) for r in (x - y, x - y - more))
        metrics = {"mse": mse, "mse_wide": wide, "aux_k": aux, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        total = mse + hyper["wide_weight"] * wide + hyper["aux_coefficient"] * aux
        return total, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _split(self, params: Params, x: Any, k: Any) -> tuple[SparseCodes, SparseCodes]:
        """A row's k largest latents, and those that the wide sum has besides."""
        weights = ops.own((x, params["b_dec"], params["W_enc"], params["b_enc"]))
        most = min(self.wide * self.k, self.n)
        size = min(most, params["W_enc"].shape[0])
        chosen: tuple = encode_topk(*weights, size, self.matmul_dtype)
        narrow, both = (
            jax.nn.relu(ops.keep_largest(chosen[0], most, active)) for active in (k, self.wide * k)
        )
        rest = jnp.where(narrow != 0, 0, both)
        return affine.used_slots(narrow, chosen[1]), affine.used_slots(rest, chosen[1])
