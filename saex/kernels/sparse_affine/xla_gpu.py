"""The backward pass without atomics: one sort of the b * k slots, then sums over neighbours."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import csc
from saex.kernels.sparse_decode import xla_gpu as sparse


def grads(
    values: Float[Array, "b k"],
    dvalues: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b o"],
    x: Float[Array, "b d"],
    W_dec: Float[Array, "n o"],
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """Three sums over each latent that share one table of neighbours."""
    (b, k), n = values.shape, W_dec.shape[0]
    dz = jnp.where(values != 0, dvalues + sparse.dots(indices, g, W_dec), 0)
    slots = csc.sort_slots(values != 0, indices, n)
    v, dz = (a.reshape(-1).at[slots.order].get(mode="clip") for a in (values, dz))
    row = slots.order // k

    def over_latents(weights, rows):
        # no latent stands twice in a row's used slots
        return sparse.segment_sums(weights, row, rows, slots.starts, longest=b)

    db_enc = over_latents(dz, jnp.ones((b, 1), dz.dtype))[:, 0]
    return over_latents(v, g), over_latents(dz, x), db_enc
