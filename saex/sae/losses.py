"""Loss terms and the figures logged beside them, from one device's part of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex.sae import ops, sums
from saex.sae.base import LossCodes, mapped


def mse(residual: Float[Array, "b d"]) -> Float[Array, ""]:
    """Mean over all rows of the mean square over d."""
    return ops.rows_mean(jnp.mean(jnp.square(residual), axis=1))


def variance(x: Float[Array, "b d"]) -> Float[Array, ""]:
    """Mean over all rows and d of the squared distance to the global batch's mean row."""
    mean = ops.rows_sum(jnp.sum(x, axis=0)) / ops.rows_count(x)
    return mse(x - mean[None])


def fvu(x: Float[Array, "b d"], residual: Float[Array, "b d"]) -> Float[Array, ""]:
    """Fraction of variance unexplained of this batch: sum ||r||^2 / sum ||x - mean||^2."""
    x, residual = jax.lax.stop_gradient((x, residual))
    return mse(residual) / jnp.maximum(variance(x), 1e-30)


def ramp(step: Any, steps: int) -> Any:
    """A coefficient's linear growth: 0 at step 0, 1 from ``steps`` on."""
    return jnp.minimum(1.0, step / steps) if steps else 1.0


def figures(
    x: Float[Array, "b d"], residual: Float[Array, "b d"], codes: LossCodes, dead: Bool[Array, " n"]
) -> dict[str, Float[Array, ""]]:
    """What every method logs: "fvu" of this batch, "l0", and the share of "dead" latents."""
    return {"fvu": fvu(x, residual), "l0": sums.l0(codes), "dead": share(dead)}


def share(latents: Bool[Array, " n"]) -> Float[Array, ""]:
    """Of all devices' latents the share that is marked."""
    marked = ops.latents_sum(jnp.sum(latents)).astype(jnp.float32)
    return marked / ops.latents_count(latents)


def l1(codes: LossCodes, W_dec: Float[Array, "n d"]) -> Float[Array, ""]:
    """Mean over rows of sum_i |f_i| ||W_dec,i||; the gradient reaches the norms too."""
    sizes = mapped(lambda c: jnp.abs(c.values), codes)
    return sums.mean_sum(sizes, row_norms(W_dec))


def row_norms(W: Float[Array, "n d"]) -> Float[Array, " n"]:
    """||W_i||, with gradient 0 where a row is zero: it must not make every weight NaN."""
    square = jnp.sum(jnp.square(W), axis=1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def eps_lbo(
    x: Float[Array, "b d"], power: Float[Array, " b"], bias: Any, n: int
) -> Float[Array, ""]:
    """Mean over rows of | ||x||^2 - ||f||^2 | / ((n - 1) ||f||^2) (arXiv 2503.24277).

    A lower bound on the largest |cosine| between two decoder rows that the gap of norms needs,
    for codes f >= 0: near 0 where n latents are all but orthogonal and as active as the row asks.

    Args:
      x: rows, in the units of the codes.
      power: this device's part of ||f||^2, codes weighed by the norms of their decoder rows.
      bias: b_dec [d], which counts as one more latent that is always on; None: without.
      n: latents on all devices.
    """
    x, power, bias = jax.lax.stop_gradient((x, power, bias))
    square = ops.latents_sum(power)
    if bias is not None:
        square = square + jnp.sum(jnp.square(bias))
    gap = jnp.abs(jnp.sum(jnp.square(x), axis=1) - square)
    return ops.rows_mean(gap / (max(n - 1, 1) * jnp.maximum(square, 1e-30)))


def aux_k(
    residual: Float[Array, "b d"], y_dead: Float[Array, "b d"], dead: Bool[Array, " n"]
) -> Float[Array, ""]:
    """AuxK (Gao et al. 2024, arXiv 2406.04093): dead latents model the residual.

    L = MSE(y_dead, e) / MSE(mean_b(e), e) with e the residual, held constant, and y_dead = f W_dec
    (no bias), f = relu of the k_aux largest pre-activations among dead latents: see
    ``affine.decode_chosen_aux``. 0 where nothing is dead. Unlike the authors' code, which adds and
    subtracts b_dec on both sides (same value), no gradient reaches b_dec through the decoder.
    """
    e = jax.lax.stop_gradient(residual)
    ratio = mse(y_dead - e) / jnp.maximum(variance(e), 1e-30)
    return jnp.where(ops.latents_sum(jnp.sum(dead)) > 0, ratio, 0)
