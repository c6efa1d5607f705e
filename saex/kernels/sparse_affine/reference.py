"""The definition of the backward pass of an affine encoder and decoder on a given support."""

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
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """dz = (dvalues + <g, W_dec[indices]>) where values != 0; then three sums over each latent."""
    n = W_dec.shape[0]
    dz = jnp.where(values != 0, dvalues + reference.dots(indices, g, W_dec), 0)
    dW_dec, dW_enc = (reference.scatter(*of, n) for of in ((values, indices, g), (dz, indices, x)))
    return dW_dec, dW_enc, reference.sums(dz, indices, n)
