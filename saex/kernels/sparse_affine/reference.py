"""The definition of the backward pass of an affine encoder and decoder on a given support."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.sparse_decode import reference


def grads(
    values: Float[Array, "b k"],
    dvalues: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b o"],
    x: Float[Array, "b d"],
    W_dec: Float[Array, "n o"],
    dots: Callable = reference.dots,
    scatter: Callable = reference.scatter,
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """dz = (dvalues + <g, W_dec[indices]>) where values != 0; then three sums over each latent.

    ``dots`` and ``scatter`` are those of a backend of ``sparse_decode``.
    """
    n = W_dec.shape[0]
    dz = jnp.where(values != 0, dvalues + dots(indices, g, W_dec), 0)
    db_enc = jnp.zeros((n,), dz.dtype).at[indices.reshape(-1)].add(dz.reshape(-1))
    return scatter(values, indices, g, n), scatter(dz, indices, x, n), db_enc
