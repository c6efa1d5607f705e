"""The definitions."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """y[b] = sum_j values[b, j] rows[indices[b, j]]."""
    return jnp.einsum("bk,bkd->bd", values, rows[indices])


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """dv[b, j] = <g[b], rows[indices[b, j]]>."""
    return jnp.einsum("bd,bkd->bk", g, rows[indices])


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """dW[i] = sum of values[b, j] g[b] over the slots with index i."""
    terms = values[:, :, None] * g[:, None, :]
    return jnp.zeros((n, g.shape[-1]), g.dtype).at[indices].add(terms)


def sums(values: Float[Array, "b k"], indices: Int[Array, "b k"], n: int) -> Float[Array, " n"]:
    """s[i] = sum of values[b, j] over the slots with index i."""
    return jnp.zeros((n,), values.dtype).at[indices.reshape(-1)].add(values.reshape(-1))
