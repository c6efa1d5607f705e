"""The backward pass as XLA on CPU runs it well: one loop over the k slots, three sums in it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import zeros_as


def grads(
    values: Float[Array, "b k"],
    dvalues: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b o"],
    x: Float[Array, "b d"],
    W_dec: Float[Array, "n o"],
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """One slot of every row at a time."""
    n = W_dec.shape[0]

    def add(totals, slot):
        dec, enc, bias = totals
        v, dv, i = slot
        dz = jnp.where(v != 0, dv + jnp.sum(g * W_dec[i], axis=-1), 0)
        dec = dec.at[i].add(v[:, None] * g)
        enc = enc.at[i].add(dz[:, None] * x)
        return (dec, enc, bias.at[i].add(dz)), None

    start = zeros_as((n, g.shape[1]), g), zeros_as((n, x.shape[1]), g), zeros_as((n,), g)
    return jax.lax.scan(add, start, (values.T, dvalues.T, indices.T))[0]
