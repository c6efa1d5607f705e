"""ReLU SAE with an L1 penalty on latents times decoder norms (Anthropic, April 2024)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, exact, losses, ops, selection
from saex.sae.base import ArraySpec, DenseCodes, Out, mapped
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class ReLU:
    """f = relu(x W_enc^T + b_enc); x_hat = f W_dec + b_dec (b_dec is not taken from the input).

    Loss: mean over rows of sum_d (x - x_hat)^2 + l1 * sum_i f_i ||W_dec,i||; l1 grows linearly from
    0 over ``l1_warmup_steps``. Decoder norms are free, nothing resamples dead latents.

    Training takes what is above 0. Where that is more than there is room for (the first steps,
    until L0 has fallen) a batch is done densely ("fallbacks" in the metrics): ``saex.sae.exact``.

    Fields:
      d_in: activation width. n: latents.
      l1: coefficient; its scale is that of inputs with unit mean square norm (``normalize``).
      l1_warmup_steps: steps until the full coefficient (the source: 5% of the run).
      capacity: room for what is above 0, in latents of a row, in the mean (on each device that
        holds latents); 0: always densely; None: what pays (``encode_above.room_for``).
      decoder_norm: norm of decoder rows at initialisation; W_enc starts as their copy.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      b_dec_init: where b_dec starts; b_enc starts at -W_enc b_dec, so that latents see centred rows
        at first. The source has both at 0 ("zeros"): where rows have a mean far from 0, as those of
        language models, a quarter of the latents then dies early.
      normalize, matmul_dtype: as in ``TopK``.
    """

    d_in: int
    n: int
    l1: float = 0.02
    l1_warmup_steps: int = 1000
    capacity: int | None = None
    decoder_norm: float = 0.1
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "mean"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} latents: at least 1 is needed")
        if self.l1 < 0 or self.l1_warmup_steps < 0:
            raise ValueError(
                f"l1={self.l1}, l1_warmup_steps={self.l1_warmup_steps}: neither can be negative"
            )
        selection.check_capacity(self.capacity)
        affine.check_dead_after(self.dead_after_tokens)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; stats: rows since each latent fired, and ``exact.STATS``."""
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        stats = {"since_fired": since, **exact.STATS}
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The L1 coefficient."""
        return {"l1": self.l1}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Random decoder directions of norm ``decoder_norm``, the encoder their copy."""
        scale = affine.scale_of(sample["x"], self.normalize)
        b_dec = affine.centre(sample["x"].astype(jnp.float32) * scale, self.b_dec_init)
        W = self.decoder_norm * affine.unit_rows(jax.random.normal(key, (self.n, self.d_in)))
        params = {
            "W_enc": W,
            "W_dec": W + 0,
            "b_enc": -(W @ b_dec),
            "b_dec": b_dec,
            "scale": scale,
        }
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32), **exact.stats()}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        x = affine.scaled(params, x)
        p = pre_activations(x, *self._encoder(params), self.matmul_dtype)
        return DenseCodes(jax.nn.relu(p))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Sum of squares plus warmed-up, norm-weighted L1 of one global batch of raw rows."""
        x = affine.scaled(params, batch["x"])

        def objective(params, p):
            codes = mapped(lambda c: jax.nn.relu(c.values), p)
            y = affine.decode(params, codes, self.matmul_dtype)
            squares, l1 = losses.mse(x - y) * self.d_in, losses.l1(codes, params["W_dec"])
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            metrics = {"mse": squares, "l1": l1, **losses.figures(x, x - y, codes, dead)}
            total = squares + hyper["l1"] * losses.ramp(step, self.l1_warmup_steps) * l1
            return total, (metrics, after, y)

        how = 0.0, self.capacity, objective, self.matmul_dtype, self._encoder
        loss, *found = selection.of_rows(params, stats, x, *how)
        return loss, Out(*found)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encoder(self, params: Params) -> tuple[Any, Any, Any]:
        return jnp.zeros((self.d_in,)), params["W_enc"], params["b_enc"]
