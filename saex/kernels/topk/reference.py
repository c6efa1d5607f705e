"""The definition of top_k."""

import jax
from jaxtyping import Array, Float, Int

from saex.kernels.topk.order import ordered


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """``jax.lax.top_k`` (sorted, stable) of ``ordered`` scores."""
    values, indices = jax.lax.top_k(ordered(scores), k)
    return values, indices
