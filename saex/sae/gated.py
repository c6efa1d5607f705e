"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, exact, losses, ops, selection, sums
from saex.sae.base import ArraySpec, DenseCodes, Out, mapped
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class Gated:
    """Which latents are on is learned apart from how large they are, so L1 shrinks no magnitude.

    s = (x - b_dec) W_enc^T; gate pi = s + b_enc; magnitude m = relu(exp(r_mag) s + b_mag);
    f = m where pi > 0; x_hat = f W_dec + b_dec. One matmul serves both paths. The same function as
    a JumpReLU: see ``as_jump_relu``.

    Loss, mean over rows: ||x - x_hat||^2 + l1 sum_i relu(pi_i) + ||x - x_gate||^2, where
    x_gate = relu(pi) W_dec + b_dec with this W_dec and this b_dec held constant; sums over d, rows
    of mean square norm 1. The first term trains no b_enc (the step has no gradient), the others no
    r_mag and b_mag. Unit decoder rows, tied initialisation, as the source: a ReLU SAE at first.

    Where we differ: dead latents stay dead (no term reaches a gate that is shut on every row, not
    even AuxK), where the source resamples them; l1 warms up, which the source does not mention. The
    source gives l1 for squares averaged over d, and trains with Adam's b1 = 0 (``optim.b1``).

    Fields:
      l1: weight of the open gates. l1_warmup_steps: steps over which it grows from 0.
      capacity: room for open gates, as in ``ReLU``.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    l1: float = 0.1
    l1_warmup_steps: int = 1000
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
        if self.n < 1:
            raise ValueError(f"n={self.n} latents: at least 1 is needed")
        for name in ("l1", "l1_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")
        selection.check_capacity(self.capacity)
        affine.check_dead_after(self.dead_after_tokens)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs`` (b_enc is the gates'), and the magnitudes' scale and bias."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["r_mag"] = ArraySpec((self.n,), ("n",), doc="log of the magnitudes' scale")
        params["b_mag"] = ArraySpec((self.n,), ("n",), doc="bias of the magnitudes")
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        stats = {"since_fired": since, **exact.STATS}
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The weight of the open gates."""
        return {"l1": self.l1}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Unit rows, tied; r_mag and the biases 0 (b_dec: as said)."""
        params, _ = affine.init_tied(key, sample["x"], self.n, self.normalize, self.b_dec_init)
        params["W_enc"] = params["W_dec"] + 0
        params["r_mag"], params["b_mag"] = jnp.zeros((self.n,)), jnp.zeros((self.n,))
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32), **exact.stats()}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        p = affine.scores(params, affine.scaled(params, x), self.matmul_dtype)
        return self._codes(params, DenseCodes(p))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Squares of both paths plus the warmed-up L1 of the open gates, of one global batch."""
        x = affine.scaled(params, batch["x"])

        def objective(params, gates):
            codes = self._codes(params, gates)
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            y = affine.decode(params, codes, self.matmul_dtype)
            opened = mapped(lambda c: jax.nn.relu(c.values), gates)
            y_gate = affine.decode(jax.lax.stop_gradient(params), opened, self.matmul_dtype)
            squares, by_gate = (losses.mse(x - z) * self.d_in for z in (y, y_gate))
            l1 = sums.mean_sum(opened)
            metrics = {"mse": squares, "gate_mse": by_gate, "l1": l1}
            metrics |= losses.figures(x, x - y, codes, dead)
            weight = hyper["l1"] * losses.ramp(step, self.l1_warmup_steps)
            return squares + weight * l1 + by_gate, (metrics, after, y)

        how = 0.0, self.capacity, objective, self.matmul_dtype
        loss, *found = selection.of_rows(params, stats, x, *how)
        return loss, Out(*found)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _codes(self, params: Params, gates: Any) -> Any:
        """The codes of gates' pre-activations."""

        def opened(c):
            vectors = params["b_enc"], jnp.exp(params["r_mag"]), params["b_mag"]
            bias, scale, offset = (sums.of_latents(v, c) for v in vectors)
            return jnp.where(c.values > 0, jax.nn.relu(scale * (c.values - bias) + offset), 0)

        return mapped(opened, gates)


def as_jump_relu(params: Params) -> Params:
    """The same function written as a JumpReLU's params: f = p where p > theta.

    p = (x - b_dec) (exp(r_mag) W_enc)^T + b_mag and theta = b_mag - exp(r_mag) b_enc, at least 0.
    """
    grown = jnp.exp(params["r_mag"])
    theta = jax.nn.relu(params["b_mag"] - grown * params["b_enc"])
    kept = {name: params[name] for name in ("W_dec", "b_dec", "scale")}
    return {
        **kept,
        "W_enc": grown[:, None] * params["W_enc"],
        "b_enc": params["b_mag"],
        "log_threshold": jnp.log(theta),
    }
