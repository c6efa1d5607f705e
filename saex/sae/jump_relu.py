"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435; Gemma Scope, arXiv 2408.05147)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, exact, losses, ops, selection, sums
from saex.sae.activations import jump, step_up
from saex.sae.base import ArraySpec, DenseCodes, Out, mapped
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class JumpReLU:
    """p = (x - b_dec) W_enc^T + b_enc; f = p where p > theta, one theta a latent.

    x_hat = f W_dec + b_dec. Loss: mean over rows of sum_d (x - x_hat)^2 + l0 * ||f||_0; l0 grows
    linearly from 0 over ``l0_warmup_steps``. theta = exp(log_threshold) is trained through a
    rectangle of width ``bandwidth`` around it (straight-through estimators); the count trains
    nothing but theta. Unit decoder rows, tied initialisation, as in Gemma Scope, which trains with
    Adam's b1 = 0 (``optim.b1``).

    Thresholds move only where pre-activations fall into the rectangle: with fewer than about 1e9
    rows the paper's bandwidth and threshold (both 0.001) are too small to lower L0; 0.03 and 0.03
    suit a few million. Training takes what is above thresholds, or near them. Where that is more
    than there is room for a batch is done densely ("fallbacks" in the metrics): ``saex.sae.exact``.

    Fields:
      l0: weight of the number of active latents, for rows with mean square norm 1.
      l0_target: None, or the L0 to reach: the loss is then l0 * (L0 / l0_target - 1)^2.
      l0_warmup_steps: steps until the full weight (Gemma Scope: 10,000).
      bandwidth: width of the rectangle. threshold: theta at initialisation.
      capacity: room for what is above or near thresholds, as in ``ReLU``.
      b_dec_init: where b_dec starts (the source: "zeros", with which more latents die early: 18%
        against 14% after 300 steps on a small language model's rows, at 2% more FVU).
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    l0: float = 1e-3
    l0_target: float | None = None
    l0_warmup_steps: int = 10_000
    bandwidth: float = 0.001
    threshold: float = 0.001
    capacity: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        for name in ("n", "bandwidth", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number above 0 is needed")
        for name in ("l0", "l0_warmup_steps", "capacity"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")
        if self.l0_target is not None and not self.l0_target > 0:
            raise ValueError(f"l0_target={self.l0_target}: a number above 0, or None")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, and log_threshold; stats: rows since each latent fired."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["log_threshold"] = ArraySpec((self.n,), ("n",), doc="log of theta, scaled units")
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        stats = {"since_fired": since, **exact.STATS}
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The weight of the count."""
        return {"l0": self.l0}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Unit rows, tied; biases 0 (b_dec: as said); theta the same for all latents."""
        params, _ = affine.init_tied(key, sample["x"], self.n, self.normalize, self.b_dec_init)
        params["W_enc"] = params["W_dec"] + 0
        params["log_threshold"] = jnp.full((self.n,), jnp.log(self.threshold))
        since = jnp.zeros((self.n,), jnp.int32)
        return params, {"since_fired": since, **exact.stats()}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        p = affine.scores(params, affine.scaled(params, x), self.matmul_dtype)
        return DenseCodes(jnp.where(p > jnp.exp(params["log_threshold"])[None], p, 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Sum of squares plus the weighted count of active latents, of one global batch."""
        ramp = losses.ramp(step, self.l0_warmup_steps)
        x = affine.scaled(params, batch["x"])

        def objective(params, p):
            theta = _thresholds(jnp.exp(params["log_threshold"]), p)
            p, theta = ops.own((p, theta))
            # slots that are not used keep their latents: thresholds feel what is just below them
            codes = mapped(lambda c, t: jump(c.values, t.values, self.bandwidth), p, theta)
            count = mapped(lambda c, t: step_up(c.values, t.values, self.bandwidth), p, theta)
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            y = affine.decode(params, codes, self.matmul_dtype)
            squares = losses.mse(x - y) * self.d_in
            active = sums.mean_sum(count)
            if self.l0_target is not None:
                active = jnp.square(active / self.l0_target - 1)
            metrics = {"mse": squares, "sparsity": active, **losses.figures(x, x - y, codes, dead)}
            return squares + hyper["l0"] * ramp * active, (metrics, after, y)

        theta = jnp.exp(params["log_threshold"])
        how = theta, self.capacity, objective, self.matmul_dtype
        loss, *found = selection.of_rows(params, stats, x, *how, margin=self.bandwidth / 2)
        return loss, Out(*found)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state


def _thresholds(theta: Any, p: Any) -> Any:
    """A threshold for each pre-activation."""
    return mapped(lambda c: jnp.broadcast_to(sums.of_latents(theta, c), c.values.shape), p)
