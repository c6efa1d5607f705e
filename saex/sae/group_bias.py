"""Group bias adaptation (Chen, Sheen, Xiong, Wang, Yang 2025, arXiv 2506.14002)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class GroupBias:
    """A tied SAE without a sparsity loss: biases are steered to how often latents shall fire.

    s = (x - b_dec) W_enc^T with unit rows, y = s + b_enc; f = s where y > 0 (the size is that of
    the unbiased projection); x_hat = (f amplitude) W_enc + b_dec. Loss: ||x - x_hat||^2 / 2, mean
    over rows. It trains W_enc and amplitude (at least 0). b_dec stays the sample's mean: trained
    through the encoder it is a bias of all latents that undoes the adaptation, and as the decoder's
    bias alone it moves what the encoder takes from rows under the biases (after 200 steps on a
    small language model's rows FVU 0.65 at L0 4, against 0.28 at 38).

    b_enc, once in ``every`` steps, from what was seen since: q_i the share of rows with y_i > 0,
    r_i the largest y_i (at least 0), T the mean of the r above 0 in latent i's group; target t:
      q_i > t:         b_enc,i <- max(b_enc,i - rate_down r_i, -1)
      q_i <= rarely:   b_enc,i <- min(b_enc,i + rate_up T, 0)
    so a target is a ceiling, and only what is all but dead is raised. Latent i is in group i mod
    ``groups``; targets fall geometrically from ``most`` to ``least``. One group is the paper's BA.

    At inference it is a JumpReLU of threshold -b_enc; ``W_dec`` holds amplitude * W_enc for that
    (made after each step, not trained). All of it is dense. Rows have mean square norm 1 around
    b_dec, the unit of the bounds -1 and 0.

    Two ladders of targets go by: 10% down to 0.01%, and a half down to 1e-3. From a tenth on
    features of the authors' statistical model are found, from a half on they are not: latents
    that fire in every other row lock on to no single feature. L0 is at most the mean target times
    n, with the default ladder a fortieth of the latents.

    The source's text was not at hand: read from a summary, its reviews and a re-implementation
    (min and max of its Algorithm 1 are swapped in print). Our reading: the form of the JumpReLU,
    that b_dec is the mean, amplitude 1 at the start.

    Fields:
      groups, most, least: as said. every: steps between adaptations. rate_down, rate_up: gammas.
      rarely: the share of rows up to which a latent counts as silent.
      relu: take f = y where y > 0 instead (the paper's theory), which shrinks.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
    """

    d_in: int
    n: int
    groups: int = 10
    most: float = 0.1
    least: float = 1e-3
    every: int = 50
    rate_down: float = 0.01
    rate_up: float = 0.01
    rarely: float = 1e-6
    relu: bool = False
    dead_after_tokens: int = 10_000_000
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ("b_enc", "W_dec")
    unit_rows: ClassVar[tuple[str, ...]] = ("W_enc",)

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        if not 1 <= self.groups <= self.n:
            raise ValueError(f"groups={self.groups} of n={self.n} latents: must be in 1..n")
        if not 0 < self.least <= self.most < 1:
            raise ValueError(f"least={self.least}, most={self.most}: 0 < least <= most < 1")
        for name in ("every", "rate_down", "rate_up"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a number above 0 is needed")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def targets(self) -> tuple[float, ...]:
        """Of each group: the largest share of rows in which its latents may fire."""
        ratio = self.least / self.most
        return tuple(self.most * ratio ** (k / max(self.groups - 1, 1)) for k in range(self.groups))

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; biases and W_dec are not trained. stats: what was seen since."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        docs = {"b_enc": "minus the threshold", "W_dec": "amplitude * W_enc", "b_dec": "mean row"}
        for name, doc in docs.items():
            params[name] = dataclasses.replace(params[name], trainable=False, doc=doc)
        params["amplitude"] = ArraySpec((self.n,), ("n",), doc="size of a latent's output")
        stats = {
            "since_fired": ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired"),
            "count": ArraySpec((self.n,), ("n",), "int32", doc="rows above 0 since the adaptation"),
            "peak": ArraySpec((self.n,), ("n",), doc="largest y since the adaptation"),
            "rows": ArraySpec((), (), "int32", doc="rows since the adaptation"),
        }
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The rates of the adaptation."""
        return {"rate_down": self.rate_down, "rate_up": self.rate_up}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Directions uniform on the sphere, b_dec the sample's mean, b_enc 0."""
        x = sample["x"].astype(jnp.float32)
        mean = jnp.mean(x, axis=0)
        scale = affine.scale_of(x - mean[None], "unit_mean_square")
        W = affine.unit_rows(jax.random.normal(key, (self.n, self.d_in)))
        params = {
            "W_enc": W,
            "W_dec": W + 0,
            "b_enc": jnp.zeros((self.n,)),
            "b_dec": mean * scale,
            "scale": scale,
            "amplitude": jnp.ones((self.n,)),
        }
        stats = {name: jnp.zeros((self.n,), jnp.int32) for name in ("since_fired", "count")}
        return params, {**stats, "peak": jnp.zeros((self.n,)), "rows": jnp.zeros((), jnp.int32)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x))[1]

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Half the squares of one global batch ``batch["x"]``; new biases where they are due."""
        x = affine.scaled(params, batch["x"])
        y, codes = self._encode(params, x)
        grown = DenseCodes(codes.values * params["amplitude"][None])
        x_hat = affine.decode({**params, "W_dec": params["W_enc"]}, grown, self.matmul_dtype)
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        stats = _seen(stats, jax.lax.stop_gradient(y), ops.rows_count(x))
        due = (step + 1) % self.every == 0
        b_enc, over = self._adapted(jax.lax.stop_gradient(params["b_enc"]), stats, hyper)
        b_enc = jnp.where(due, b_enc, params["b_enc"])
        stats |= {name: jnp.where(due, 0, stats[name]) for name in ("count", "peak", "rows")}
        squares = losses.mse(x - x_hat) * self.d_in
        metrics = {"mse": squares, "over_target": over}
        metrics |= losses.figures(x, x - x_hat, codes, dead)
        frozen = {"b_enc": b_enc, "W_dec": params["W_dec"]}
        return 0.5 * squares, Out(metrics, stats, x_hat, jax.lax.stop_gradient(frozen))

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Amplitudes at least 0 (a negative one would turn the direction), W_dec made of W_enc."""
        amplitude = jax.nn.relu(state.params["amplitude"])
        W_dec = amplitude[:, None] * state.params["W_enc"]
        return state.replace(params={**state.params, "amplitude": amplitude, "W_dec": W_dec})

    def _encode(self, params: Params, x: Any) -> tuple[Float[Array, "b n"], DenseCodes]:
        """(y, codes)."""
        s = jnp.einsum(
            "bd,nd->bn",
            (x - params["b_dec"][None]).astype(self.matmul_dtype),
            params["W_enc"].astype(self.matmul_dtype),
            preferred_element_type=jnp.float32,
        )
        y = s + params["b_enc"][None]
        return y, DenseCodes(jnp.where(y > 0, y if self.relu else s, 0))

    def _adapted(self, b_enc: Any, stats: Params, hyper: Params) -> tuple[Any, Any]:
        """(b_enc after an adaptation, share of latents that fired more often than meant)."""
        n = b_enc.shape[0]
        group = (jnp.arange(n) + ops.latents_offset(n)) % self.groups
        mine = group[:, None] == jnp.arange(self.groups)[None]
        peak = jax.nn.relu(stats["peak"])
        share = stats["count"] / jnp.maximum(stats["rows"], 1)
        up = hyper["rate_up"] * _mean_above_0(peak, mine)[group]
        over = share > jnp.asarray(self.targets, jnp.float32)[group]
        down = jnp.maximum(b_enc - hyper["rate_down"] * peak, -1.0)
        raised = jnp.where(share <= self.rarely, jnp.minimum(b_enc + up, 0.0), b_enc)
        above = ops.latents_sum(jnp.sum(over, dtype=jnp.float32)) / ops.latents_count(b_enc)
        return jnp.where(over, down, raised), above


def _seen(stats: Params, y: Float[Array, "b n"], rows: int) -> Params:
    """The stats after one more global batch."""
    count = ops.rows_sum(jnp.sum(y > 0, axis=0, dtype=jnp.int32))
    peak = ops.rows_max(jnp.max(y, axis=0))
    return {
        **stats,
        "count": stats["count"] + count,
        "peak": jnp.maximum(stats["peak"], peak),
        "rows": stats["rows"] + rows,
    }


def _mean_above_0(peak: Float[Array, " n"], mine: Bool[Array, "n g"]) -> Float[Array, " g"]:
    """Of each group over all devices: the mean of the values above 0, or 0."""
    there = mine & (peak > 0)[:, None]
    total = ops.latents_sum(jnp.sum(jnp.where(there, peak[:, None], 0), axis=0))
    return total / jnp.maximum(ops.latents_sum(jnp.sum(there, axis=0)), 1)
