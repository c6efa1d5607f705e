"""top_k for XLA on GPU, where ``lax.top_k`` with k > 16 is a full sort of all n scores.

Two exact levels, as in ``cpu.py``: the maxima of contiguous groups, then the k best groups put back
in order, so that ties still go to the lowest index. Both levels are again a ``top_k``, so that what
is sorted in the end is at most ``SORTED`` or a few k wide, whatever n is. At n = 131072, k = 64:
rows of 256 and 512 three times over, instead of one of 131072.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.topk.order import group_maxima, key_of, score_of

SORTED = 1024  # rows this short are sorted in shared memory by one kernel


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Exact top-k by group maxima; rows too short to gain are sorted at once."""
    n = scores.shape[1]
    g = group_of(n, k)
    if g == 1:
        # integers are sorted in any case; what XLA does to floats with few of a row is its own
        keys, indices = jax.lax.top_k(key_of(scores), k)
        return score_of(keys, scores.dtype), indices
    lowest = jnp.asarray(-jnp.inf, scores.dtype)
    padded = jnp.pad(scores, ((0, 0), (0, -n % g)), constant_values=lowest)
    return finish(scores, group_maxima(padded, g), k, g)


def finish(
    scores: Float[Array, "b n"],
    maxima: Float[Array, "b m"],
    k: int,
    g: int,
    bias: Float[Array, " n"] | None = None,
    n: int | None = None,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The second level: top-k of the ``k`` groups with the largest of ``maxima``.

    Args:
      scores: all of them; k * g of a row are read.
      maxima: of the groups of ``g`` neighbours, bias added; the last may reach beyond n.
      bias: what is to be added to the scores, or None.
      n: how many of a row's scores count, where they were padded; None: all.
    """
    b, groups = scores.shape[0], maxima.shape[1]
    n = scores.shape[1] if n is None else n
    _, chosen = top_k(maxima, min(k, groups))
    chosen = jnp.sort(chosen, axis=-1)
    where = (chosen[:, :, None] * g + jnp.arange(g)[None, None]).reshape(b, -1)
    candidates = jnp.take_along_axis(scores, where, axis=1, mode="clip")
    if bias is not None:
        candidates = candidates + bias.at[where].get(mode="clip")
    # Beyond n lie the last candidates of a row: after every real one, also among -inf.
    candidates = jnp.where(where < n, candidates, jnp.asarray(-jnp.inf, scores.dtype))
    values, slots = top_k(candidates, k)
    groups_of_slots = jnp.take_along_axis(chosen, slots // g, axis=1, mode="clip")
    return values, groups_of_slots * g + slots % g


def group_of(n: int, k: int) -> int:
    """Scores a group: the power of two near sqrt(n / k), where n / g + k g is least; 1: no gain."""
    g = 2 ** max(round(math.log2(n / k) / 2), 0)
    gains = n > SORTED and -(-n // g) + k * g <= n // 2
    return g if gains else 1
