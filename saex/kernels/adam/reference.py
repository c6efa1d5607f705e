"""The update in plain jnp: optax between a projection and a normalisation."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def adam(rows, g, mu, nu, scalars, betas, eps, unit):
    """See ``kernels.adam.adam``; of free arrays of any shape too."""
    rate, c1, c2, factor = scalars
    g = tangent(rows, g) if unit else g
    squares, g = jnp.sum(jnp.square(g)), jnp.where(factor == 0, 0.0, g * factor)
    mu = optax.tree.update_moment(g, mu, betas[0], 1)
    nu = optax.tree.update_moment(g, nu, betas[1], 2)
    rows = rows - rate * ((mu / c1) / (jnp.sqrt(nu / c2) + eps))
    rows = unit_rows(rows) if unit else rows
    return rows, mu, nu, squares, jnp.sum(rows)


def tangent(W: Float[Array, "n d"], g: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """g without each row's part along the (unit) row of W."""
    return g - jnp.sum(g * W, axis=1, keepdims=True) * W


def unit_rows(W: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows scaled to norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-12)
