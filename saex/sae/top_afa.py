"""Top-AFA SAE: as many latents as make up a row's norm, without a k (arXiv 2503.24277)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops, selection
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class TopAFA:
    """p = (x - b_dec) W_enc^T + b_enc; f keeps relu(p) at a row's largest s_i = p_i ||W_dec,i||.

    As many as bring the norm of the kept s nearest to ||x - b_dec||, at least one: were the decoder
    rows orthogonal, codes and row would have one norm (the approximate feature activation, AFA, of
    Lee, Davies, Canby, Hockenmaier 2025). x_hat = f W_dec + b_dec. Where all positive latents do
    not reach the norm, all are kept (the authors never keep all n).

    Loss: mean over rows of sum_d (x - x_hat)^2 + afa d (||f|| - ||x||)^2 + aux_coefficient * AuxK.
    That is the authors' loss: they take the mean square over d of rows of norm sqrt(d), we rows of
    norm 1 on average, hence the factor d; the norm loss compares with x, the selection with
    x - b_dec, as their code does. They normalise each row by itself, we all rows by one scale, and
    AuxK is as in ``TopK``. The metric "eps_lbo" is ``losses.eps_lbo``, the paper's diagnostic.

    L0 is what comes out: 1000 and more of 12288 in the paper. Training is dense.

    Fields:
      afa: weight of the norm loss; the paper sweeps 1/128 to 1/16, and L0 grows with it.
      b_dec_init: where b_dec starts; "zeros" is the source's. At the centre L0 comes out larger
        (303 for 225 after 300 steps on a small language model's rows, FVU 0.049 for 0.068), and 27%
        of the latents are dead, not 3%.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    afa: float = 1 / 64
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "zeros"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        if self.n < 2:
            raise ValueError(f"n={self.n} latents: at least 2 are needed")
        if self.afa < 0:
            raise ValueError(f"afa={self.afa}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; stats: rows since each latent fired."""
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        params = affine.specs(self.d_in, self.d_in, self.n)
        return {"params": params, "stats": {"since_fired": since}}

    def hyper(self) -> dict[str, float]:
        """The weights of the norm loss and of AuxK."""
        return {"afa": self.afa, "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Unit rows, tied; b_dec as said."""
        params, _ = affine.init_tied(key, sample["x"], self.n, self.normalize, self.b_dec_init)
        params["W_enc"] = params["W_dec"] + 0
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Squares, norm loss and AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])

        codes = self._encode(params, x)
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
        codes, y, aux_k, served = affine.decode_aux(params, x, codes, dead, *aux)
        squares, gap = losses.mse(x - y) * self.d_in, _norm_gap(x, codes)
        metrics = {"mse": squares, "afa": gap, "aux_k": aux_k, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        # decoder rows are unit vectors while training
        metrics["eps_lbo"] = losses.eps_lbo(x, _power(codes), params["b_dec"], self.n)
        total = squares + hyper["afa"] * self.d_in * gap
        return total + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encode(self, params: Params, x: Any) -> DenseCodes:
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        p = jax.nn.relu(pre_activations(x, *weights, self.matmul_dtype))
        held = jax.lax.stop_gradient(params)
        sizes = jax.lax.stop_gradient(p) * losses.row_norms(held["W_dec"])[None]
        norm = jnp.linalg.norm(jax.lax.stop_gradient(x) - held["b_dec"][None], axis=1)
        cut = selection.norm_cut(sizes, norm)
        return DenseCodes(jnp.where(sizes >= cut[:, None], p, 0))


def _norm_gap(x: Any, codes: Any) -> Any:
    """Mean over rows of (||f|| - ||x||)^2; no gradient where f = 0."""
    square = ops.latents_sum(_power(codes))
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return ops.rows_mean(jnp.square(norm - jnp.linalg.norm(x, axis=1)))


def _power(codes: DenseCodes) -> Any:
    """This device's part of each row's ||f||^2."""
    return jnp.sum(jnp.square(codes.values), axis=1)
