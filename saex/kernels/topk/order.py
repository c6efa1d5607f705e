"""The order of scores: NaN above all, -0 equal to 0.

``lax.top_k`` looks at the sign bit first: a NaN that has one, as ``inf - inf`` has on x86, comes
last there, and -0 after 0. XLA's maximum on CPU drops NaN, its TopK kernels need not keep it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ordered(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The scores with every NaN the one that ``lax.top_k`` puts first, and 0 for -0."""
    scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
    return jnp.where(scores == 0, 0, scores).astype(scores.dtype)


def key_of(scores: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Integers, as wide as the scores, that order like them."""
    bits = 8 * scores.dtype.itemsize
    return _flip(jax.lax.bitcast_convert_type(ordered(scores), f"int{bits}"))


def score_of(key: Int[Array, "*s"], dtype: Any) -> Float[Array, "*s"]:
    """The score of a key."""
    return jax.lax.bitcast_convert_type(_flip(key), dtype)


def group_maxima(scores: Float[Array, "b n"], g: int) -> Float[Array, "b m"]:
    """The maximum of each ``g`` neighbours, NaN where one of them is; n is a multiple of g."""
    grouped = scores.reshape(scores.shape[0], -1, g)
    lowest = jnp.asarray(-jnp.inf, scores.dtype)
    # NaN in either place wins; with a where(isnan) before it this loop is ten times slower on CPU
    most = jax.lax.reduce(grouped, lowest, lambda a, b: jnp.where((a >= b) | (a != a), a, b), (2,))
    return ordered(most)


def _flip(bits):
    """float bits <-> integers that order alike: below 0 the magnitude's order is turned."""
    width = 8 * bits.dtype.itemsize - 1
    return bits ^ ((bits >> width) & (2**width - 1))
