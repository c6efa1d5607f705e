"""The definition of top_k."""

import jax
from jaxtyping import Array, Float, Int


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """``jax.lax.top_k``: sorted, stable."""
    values, indices = jax.lax.top_k(scores, k)
    return values, indices
