"""top_k in two exact levels, for XLA on CPU, whose own TopK is single-threaded and reads slowly.

Let t be the k-th largest score. Entries above t lie in fewer than k groups with a maximum above
t, so the k groups of the largest maxima hold them all, and enough of the entries equal to t.
Groups are contiguous and are put back in order before the second level, so that ties still go to
the lowest index.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.topk.order import group_maxima, ordered

# Entries a group, and groups a k from which on two levels pay: where they do, 16 is the best size
# or within a quarter of it (experiments/benchmarks/results/topk_groups_cpu.md).
GROUP = 16
GROUPS_PER_K = 16


def two_levels(n: int, k: int) -> bool:
    """Whether groups are selected first."""
    return n % GROUP == 0 and n // GROUP >= GROUPS_PER_K * k


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Exact top-k by group maxima; falls back to one level where groups would not pay."""
    b, n = scores.shape
    if not two_levels(n, k):
        return _top_k(ordered(scores), k)
    _, chosen = _top_k(group_maxima(scores, GROUP), k)
    chosen = jnp.sort(chosen, axis=-1)
    grouped = scores.reshape(b, n // GROUP, GROUP)
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1).reshape(b, k * GROUP)
    values, slots = _top_k(ordered(candidates), k)
    indices = jnp.take_along_axis(chosen, slots // GROUP, axis=1) * GROUP + slots % GROUP
    return values, indices


def _top_k(scores, k):
    # One barrier per array: a slice of top_k's outputs in the same program would turn the TopK
    # call into a full sort (26x slower), and a barrier over the pair aborts JAX 0.10.
    values, indices = jax.lax.top_k(scores, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)
