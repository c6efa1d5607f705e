"""JumpReLU SAE with tanh sparsity and a pre-activation loss (Conerly et al., January 2025)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops, sums
from saex.sae.activations import jump
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params

SAMPLE = 1024  # rows on which biases are found


@dataclasses.dataclass(frozen=True)
class JumpReLUTanh:
    """p = x W_enc^T + b_enc; f = p where p > theta = exp(log_threshold); x_hat = f W_dec + b_dec.

    Loss, a mean over rows of sum_d (x - x_hat)^2 + sparsity * sum_i tanh(tanh_scale f_i w_i) +
    pre_activation * sum_i relu(theta_i - p_i) w_i, w_i = ||W_dec,i||: Anthropic's Circuits Updates,
    January 2025. The tanh nearly counts, yet has a gradient in f and w, so no straight-through step
    is needed; thresholds learn through the jump's rectangle and the last term, which also lifts
    latents that are off (p too feels it), so that none dies. We read the update in other projects'
    versions: what reaches p through the jump is the gradient of its active side alone.

    Rows are scaled to mean square d (norm sqrt(d)), as in the source: sparsity is in squares of
    d dimensions, so it grows with d. Decoder norms are free; b_dec is not taken from the input. The
    last term reads every latent: the loss is dense, about 10 b d n operations a step.

    Fields:
      sparsity: the final weight of the tanh, reached linearly over ``sparsity_warmup_steps`` (None:
        over the whole run, as in the source).
      tanh_scale: c of the source. pre_activation: weight of the last term.
      bandwidth: width of the rectangle around thresholds. threshold: theta at initialisation.
      initial_l0: latents that fire in a row at the start, at most n / 2; sets b_enc.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      matmul_dtype: as in ``TopK``.
    """

    d_in: int
    n: int
    sparsity: float = 10.0
    sparsity_warmup_steps: int | None = None
    tanh_scale: float = 4.0
    pre_activation: float = 3e-6
    bandwidth: float = 2.0
    threshold: float = 0.1
    initial_l0: int = 10_000
    dead_after_tokens: int = 10_000_000
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        for name in ("n", "tanh_scale", "bandwidth", "threshold", "initial_l0"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number above 0 is needed")
        for name in ("sparsity", "sparsity_warmup_steps", "pre_activation"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, and log_threshold; stats: rows since each latent fired."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["log_threshold"] = ArraySpec((self.n,), ("n",), doc="log of theta, scaled units")
        stats = {
            "since_fired": ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        }
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The weights of the tanh and of the pre-activation loss."""
        return {"sparsity": self.sparsity, "pre_activation": self.pre_activation}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """W_dec uniform, W_enc = d / n of it, b_dec 0, b_enc so that all latents fire alike."""
        scale = self.d_in**0.5 * affine.scale_of(sample["x"], "unit_mean_square")
        W_dec = affine.tied_init(key, self.d_in, self.n)
        W_enc = self.d_in / self.n * W_dec
        p = (sample["x"][:SAMPLE].astype(jnp.float32) * scale) @ W_enc.T
        share = min(self.initial_l0 / self.n, 0.5)
        params = {
            "W_enc": W_enc,
            "W_dec": W_dec,
            "b_enc": self.threshold - jnp.quantile(p, 1 - share, axis=0),
            "b_dec": jnp.zeros((self.d_in,)),
            "scale": scale,
            "log_threshold": jnp.full((self.n,), jnp.log(self.threshold)),
        }
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        p = self._scores(params, affine.scaled(params, x))
        return DenseCodes(jnp.where(p > jnp.exp(params["log_threshold"])[None], p, 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Squares, tanh and pre-activation loss of one global batch of raw rows."""
        x, theta = affine.scaled(params, batch["x"]), jnp.exp(params["log_threshold"])
        p = self._scores(params, x)
        p, wide = ops.own((p, jnp.broadcast_to(theta[None], p.shape)))
        codes = DenseCodes(jump(p, wide, self.bandwidth))
        y = affine.decode(params, codes, self.matmul_dtype)
        squares = losses.mse(x - y) * self.d_in
        norms = losses.row_norms(params["W_dec"])
        tanh = jnp.tanh(self.tanh_scale * codes.values * norms[None])
        active = sums.mean_sum(DenseCodes(tanh))
        off = sums.mean_sum(DenseCodes(jax.nn.relu(wide - p)), norms)
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        metrics = {"mse": squares, "sparsity": active, "pre_activation": off}
        metrics |= losses.figures(x, x - y, codes, dead)
        whole = jnp.minimum(1.0, step / hyper["steps"])
        steps = self.sparsity_warmup_steps
        grown = whole if steps is None else losses.ramp(step, steps)
        total = squares + hyper["sparsity"] * grown * active + hyper["pre_activation"] * off
        return total, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _scores(self, params: Params, x: Any) -> Any:
        no_bias = jnp.zeros((self.d_in,))
        return pre_activations(x, no_bias, params["W_enc"], params["b_enc"], self.matmul_dtype)
