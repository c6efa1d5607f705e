"""Crosscoder: one ReLU code for several sites (Lindsey et al. 2024, sparse crosscoders)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, exact, losses, ops, selection, sites, sums
from saex.sae.base import ArraySpec, DenseCodes, Out, mapped
from saex.typing import Batch, Params


def specs(d: int, n: int) -> dict[str, ArraySpec]:
    """``affine.specs`` with a scale for each entry, the same for all of a site."""
    scale = ArraySpec((d,), ("d",), trainable=False, doc="weights see x * scale")
    return {**affine.specs(d, d, n), "scale": scale}


def scaled(params: Params, x: Any) -> Any:
    """Raw rows of any float dtype in the units that the weights see, float32."""
    return x.astype(jnp.float32) * params["scale"][None]


def decoder(key: jax.Array, widths: tuple[int, ...], n: int, norm: float) -> jax.Array:
    """[n, d]: random directions of this norm at every site."""
    W = jax.random.normal(key, (n, sum(widths)))
    return norm * W / (jnp.maximum(sites.norms(W, widths), 1e-12) @ sites.masks(widths))


@dataclasses.dataclass(frozen=True)
class Crosscoder:
    """f = relu(sum_l x^l W_enc^l^T + b_enc); x_hat^l = f W_dec^l + b_dec^l at every site l.

    x is the sites side by side (config.site "a+b"): layers, or models that read the same tokens.
    No bias is taken from the input. Loss: mean over rows of sum_l ||x^l - x_hat^l||^2 + l1 * sum_i
    f_i N_i with N_i = sum_l ||W_dec,i^l||: the sum of norms favours latents of few sites. l1 grows
    linearly from 0 over ``l1_warmup_steps``. Decoder norms are free. Of one site this is ``ReLU``.

    Each site is scaled by itself so that all weigh the same; ``sites.relative_norms`` says where a
    latent lives, ``sites.difference`` compares two sites.

    Fields:
      d_in: width of all sites together. n: latents.
      widths: width of each site; (): one site.
      l1: coefficient, for sites of unit mean square norm each.
      l1_warmup_steps: steps until the full coefficient.
      capacity: as in ``ReLU``.
      decoder_norm: norm of decoder rows at each site at initialisation; W_enc starts as their copy.
      dead_after_tokens: rows without firing after which a latent counts as dead (a metric).
      normalize, matmul_dtype: as in ``TopK``. b_dec_init: as in ``ReLU``, b_enc with it (the source
        has "zeros"; three sites of a small language model left three latents of five dead so).
    """

    d_in: int
    n: int
    widths: tuple[int, ...] = ()
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
        sites.check_widths(self.site_widths, self.d_in)
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

    @property
    def site_widths(self) -> tuple[int, ...]:
        """``widths``, of one site where there are none."""
        return self.widths or (self.d_in,)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``specs`` of this file; stats: rows since each latent fired."""
        since = ArraySpec((self.n,), ("n",), "int32", doc="rows since it last fired")
        stats = {"since_fired": since, **exact.STATS}
        return {"params": specs(self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The L1 coefficient."""
        return {"l1": self.l1}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Random decoder directions of equal norm at each site, the encoder their copy."""
        W = decoder(key, self.site_widths, self.n, self.decoder_norm)
        scale = sites.scales(sample["x"], self.site_widths, self.normalize)
        b_dec = affine.centre(sample["x"].astype(jnp.float32) * scale[None], self.b_dec_init)
        params = {"W_enc": W, "W_dec": W + 0, "b_enc": -(W @ b_dec), "b_dec": b_dec, "scale": scale}
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32), **exact.stats()}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d] of all sites."""
        p = pre_activations(scaled(params, x), *self._encoder(params), self.matmul_dtype)
        return DenseCodes(jax.nn.relu(p))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d] of all sites, float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"][None]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Sum of squares plus warmed-up L1 of norms, of one global batch of raw rows."""
        x = scaled(params, batch["x"])

        def objective(params, p):
            codes = mapped(lambda c: jax.nn.relu(c.values), p)
            y = affine.decode(params, codes, self.matmul_dtype)
            squares = losses.mse(x - y) * self.d_in
            norms = jnp.sum(sites.norms(params["W_dec"], self.site_widths), axis=1)
            l1 = sums.mean_sum(codes, norms)
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            metrics = {"mse": squares, "l1": l1, **losses.figures(x, x - y, codes, dead)}
            metrics |= sites.fvus(x, x - y, self.site_widths)
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
