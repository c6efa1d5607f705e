"""Skip transcoder: TopK latents beside a linear path (Paulo et al. 2025, arXiv 2501.18823)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class SkipTranscoder:
    """f = relu(top_k(x W_enc^T + b_enc)); y_hat = f W_dec + x W_skip^T + b_dec.

    x is the input of a part of the model (an MLP), y (column "y") its output; their widths may
    differ. Loss: s * MSE(y, y_hat) + aux_coefficient * AuxK, with s = 1 / variance of the sample's
    y per dimension. W_dec and W_skip start at 0 and b_dec at the mean of y, so that the loss starts
    at that of a constant, 1; b_enc starts where the mean of x gives 0. Decoder norms are free.

    Without ``context`` (the rows of x) ``decode`` leaves the skip path out: then it says what the
    latents add.

    Fields:
      d_in, d_out: widths of x and y. n: latents. k: active latents a row (a sweep's upper bound).
      aux_coefficient: weight of AuxK (the source: 0). k_aux: dead latents that may serve a row;
        None: the power of two nearest to d_out / 2.
      dead_after_tokens: rows without firing after which a latent counts as dead.
      normalize: scale of x and, by itself, of y.
      skip: whether there is the linear path; without it, this is a TopK transcoder.
      matmul_dtype: inputs of matmuls; everything accumulates in float32.
    """

    d_in: int
    d_out: int
    n: int
    k: int = 32
    aux_coefficient: float = 0.0
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    skip: bool = True
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x", "y")
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        for name in ("d_in", "d_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux={self.k_aux}: at least 1; aux_coefficient=0 switches AuxK off")
        affine.check_dead_after(self.dead_after_tokens)

    @property
    def aux_latents(self) -> int:
        """k_aux, or the power of two nearest to d_out / 2, at most n."""
        return affine.latents_for_aux(self.k_aux, self.d_out, self.n)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, the scale of y, W_skip [d_out, d_in]; stats as ``TopK``."""
        params = affine.specs(self.d_in, self.d_out, self.n)
        params["y_scale"] = ArraySpec((), (), trainable=False, doc="the decoder makes y * y_scale")
        if self.skip:
            params["W_skip"] = ArraySpec((self.d_out, self.d_in), (None, "d"), doc="linear path")
        stats = {
            "since_fired": ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired"),
            "mse_scale": ArraySpec((), (), doc="1 / variance of the sample's y, per dimension"),
        }
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """The constant predictor: zero decoder, an encoder that gives 0 at the mean of x."""
        x, y = (sample[name].astype(jnp.float32) for name in ("x", "y"))
        scale, y_scale = (affine.scale_of(rows, self.normalize) for rows in (x, y))
        W_enc = affine.tied_init(key, self.d_in, self.n)
        params = {
            "W_enc": W_enc,
            "W_dec": jnp.zeros((self.n, self.d_out)),
            "b_enc": -(W_enc @ (jnp.mean(x, axis=0) * scale)),
            "b_dec": jnp.mean(y, axis=0) * y_scale,
            "scale": scale,
            "y_scale": y_scale,
        }
        if self.skip:
            params["W_skip"] = jnp.zeros((self.d_out, self.d_in))
        stats = {
            "since_fired": jnp.zeros((self.n,), jnp.int32),
            "mse_scale": affine.mse_scale(y * y_scale),
        }
        return params, stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d_in]."""
        return self._encode(params, affine.scaled(params, x), self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows of y [b, d_out], float32; ``context``: rows of x, for the linear path."""
        y = affine.decode(params, codes, self.matmul_dtype)
        if context is not None:
            y = y + self._linear(params, affine.scaled(params, context))
        return y / params["y_scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows "x" and "y"."""
        x, y = affine.scaled(params, batch["x"]), batch["y"].astype(jnp.float32) * params["y_scale"]
        chosen = self._encode(jax.lax.stop_gradient(params), x, hyper["k"])
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        encoder = {**params, "b_dec": jnp.zeros((self.d_in,))}  # nothing is taken from x
        rest = params["b_dec"][None] + self._linear(params, x)
        aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
        codes, y_hat, y_dead, served = affine.decode_both(encoder, x, chosen, dead, *aux)
        y_hat = y_hat + rest
        aux_k = jnp.zeros(()) if y_dead is None else losses.aux_k(y - y_hat, y_dead, dead)
        mse = stats["mse_scale"] * losses.mse(y - y_hat)
        metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served}
        metrics |= losses.figures(y, y - y_hat, codes, dead)
        return mse + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, y_hat)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _linear(self, params: Params, x: Any) -> Any:
        """x W_skip^T in scaled units; 0 where there is no linear path."""
        if not self.skip:
            return jnp.zeros((1, self.d_out))
        inputs = (x.astype(self.matmul_dtype), params["W_skip"].astype(self.matmul_dtype))
        return jnp.einsum("bd,od->bo", *inputs, preferred_element_type=jnp.float32)

    def _encode(self, params: Params, x: Any, k: Any) -> SparseCodes:
        weights = (jnp.zeros((self.d_in,)), params["W_enc"], params["b_enc"])
        values, indices = ops.select_topk(x, *weights, self.k, k, self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)
