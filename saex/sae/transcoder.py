"""Transcoder: the sparse surrogate of a map such as an MLP (Dunefsky et al. 2024, 2406.11944)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, exact, losses, ops, selection
from saex.sae.base import ArraySpec, DenseCodes, Out, mapped
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class Transcoder:
    """f = relu((x - b_in) W_enc^T + b_enc); y_hat = f W_dec + b_dec, to be compared with y.

    x is the input of a part of the model (an MLP), y (column "y") its output; their widths may
    differ. Loss: mean over rows of sum_d (y - y_hat)^2 + l1 * sum_i f_i, l1 growing linearly from 0
    over ``l1_warmup_steps``. Decoder rows have unit norm, and the gradient along them is removed.

    The authors divide each row's squared error by the norm of its y; here one constant divides all
    (``normalize``), so that the optimum is that of the squared error. Their resampling by ghost
    gradients is left out.

    Fields:
      d_in, d_out: widths of x and y. n: latents.
      l1: coefficient, for x and y of unit mean square norm.
      l1_warmup_steps: steps until the full coefficient.
      capacity: as in ``ReLU``.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      normalize: scale of x and, by itself, of y. b_init: where b_in and b_dec start, of x and y.
      matmul_dtype: inputs of matmuls; everything accumulates in float32.
    """

    d_in: int
    d_out: int
    n: int
    l1: float = 0.01
    l1_warmup_steps: int = 1000
    capacity: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_init: affine.BiasInit = "mean"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x", "y")
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.l1 < 0 or self.l1_warmup_steps < 0:
            raise ValueError(
                f"l1={self.l1}, l1_warmup_steps={self.l1_warmup_steps}: neither can be negative"
            )
        selection.check_capacity(self.capacity)
        affine.check_dead_after(self.dead_after_tokens)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, b_in and the scale of y; stats: rows since each latent fired."""
        params = affine.specs(self.d_in, self.d_out, self.n)
        params["b_in"] = ArraySpec((self.d_in,), ("d",), doc="taken from x")
        params["y_scale"] = ArraySpec((), (), trainable=False, doc="the decoder makes y * y_scale")
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        stats = {"since_fired": since, **exact.STATS}
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The L1 coefficient."""
        return {"l1": self.l1}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Random encoder, random unit decoder rows; b_in and b_dec at the centres of x and y."""
        encoder_key, decoder_key = jax.random.split(key)
        x, y = (sample[name].astype(jnp.float32) for name in ("x", "y"))
        scale, y_scale = (affine.scale_of(rows, self.normalize) for rows in (x, y))
        params = {
            "W_enc": affine.tied_init(encoder_key, self.d_in, self.n),
            "W_dec": affine.unit_rows(jax.random.normal(decoder_key, (self.n, self.d_out))),
            "b_enc": jnp.zeros((self.n,)),
            "b_dec": affine.centre(y * y_scale, self.b_init),
            "scale": scale,
            "b_in": affine.centre(x * scale, self.b_init),
            "y_scale": y_scale,
        }
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32), **exact.stats()}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d_in]."""
        p = pre_activations(affine.scaled(params, x), *_encoder(params), self.matmul_dtype)
        return DenseCodes(jax.nn.relu(p))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows of y [b, d_out], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["y_scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Sum of squares plus warmed-up L1 of one global batch of raw rows "x" and "y"."""
        x, y = affine.scaled(params, batch["x"]), batch["y"].astype(jnp.float32) * params["y_scale"]

        def objective(params, p):
            codes = mapped(lambda c: jax.nn.relu(c.values), p)
            y_hat = affine.decode(params, codes, self.matmul_dtype)
            squares = losses.mse(y - y_hat) * self.d_out
            l1 = losses.l1(codes, params["W_dec"])  # whose rows have unit norm
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            metrics = {"mse": squares, "l1": l1, **losses.figures(y, y - y_hat, codes, dead)}
            total = squares + hyper["l1"] * losses.ramp(step, self.l1_warmup_steps) * l1
            return total, (metrics, after, y_hat)

        how = 0.0, self.capacity, objective, self.matmul_dtype, _encoder
        loss, *found = selection.of_rows(params, stats, x, *how)
        return loss, Out(*found)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state


def _encoder(params: Params) -> tuple[Any, Any, Any]:
    return params["b_in"], params["W_enc"], params["b_enc"]
