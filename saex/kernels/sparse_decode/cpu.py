"""The forms that XLA on CPU runs well (measured; the einsum forms hold [b, k, d] and cost 3x).

decode: an unrolled sum, whose gathers fuse into the adds. dots: a loop over the k slots.
scatter: a loop of k scatter-adds of [b, d].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import zeros_as

UNROLL = 32  # slots whose gathers are fused into one loop over the rows


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """Unrolled in blocks of ``UNROLL`` slots."""
    # made before: fused into the sums, what made a value would be done again for each of d
    values, indices = jax.lax.optimization_barrier((values, indices))
    y = jnp.zeros((values.shape[0], rows.shape[1]), jnp.float32)
    for start in range(0, values.shape[1], UNROLL):
        for j in range(start, min(start + UNROLL, values.shape[1])):
            y = y + values[:, j, None] * rows[indices[:, j]]
        y = jax.lax.optimization_barrier(y)
    return y


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """One gather and one row-wise product at a time."""
    return jax.lax.map(lambda i: jnp.sum(g * rows[i], axis=-1), indices.T).T


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """One slot of every row at a time."""

    def add(total, slot):
        v, i = slot
        return total.at[i].add(v[:, None] * g), None

    return jax.lax.scan(add, zeros_as((n, g.shape[-1]), g), (values.T, indices.T))[0]
