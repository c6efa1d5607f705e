"""top_k in exact levels, for XLA on CPU, whose own TopK walks each row alone on one thread.

Let t be the k-th largest score. Entries above t lie in fewer than k groups with a maximum above
t, so the k groups of the largest maxima hold them all, and enough of the entries equal to t. Which
groups those are is the same question again, about fewer numbers; in the end a sorting network
answers it. Groups are contiguous and are put in order before their entries are compared, so that
ties still go to the lowest index. Rows are taken a block at a time, which stays in cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.topk.network import largest
from saex.kernels.topk.order import group_maxima, key_of, ordered, score_of

# Entries of a group of scores, and of a group of what is held in cache: of 8, 16, 32 and of 4, 8
# the fastest (experiments/benchmarks/results/topk_cpu.md). Fewer scores than SCORES, and more slots
# than SLOTS, are left to XLA.
GROUP = 16
STEP = 4
SCORES = 2**16
SLOTS = 256
ROWS = 1024  # of a block; an encoder that is given fewer reads its weights too often


def by_network(b: int, n: int, k: int) -> bool:
    """Whether so many scores are worth their network, which takes a second to compile."""
    return b * n >= SCORES and k <= SLOTS and n % GROUP == 0


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Exact top-k by levels of maxima; XLA's own where that would not pay."""
    b, n = scores.shape
    if not by_network(b, n, k) or scores.dtype.itemsize > 4:
        return _top_k(ordered(scores), k)
    return in_blocks(lambda rows: _by_levels(rows, k), scores)


def in_blocks(fn: Callable, x: Float[Array, "b d"]) -> tuple[jax.Array, jax.Array]:
    """``fn`` of x, rows to two arrays of as many rows, on a block of ``block_rows`` at a time."""
    b, d = x.shape
    rows = block_rows(b)
    if rows == b:
        return fn(x)
    one, two = jax.lax.map(fn, jnp.pad(x, ((0, -b % rows), (0, 0))).reshape(-1, rows, d))
    return one.reshape(-1, one.shape[-1])[:b], two.reshape(-1, two.shape[-1])[:b]


def block_rows(b: int) -> int:
    """Rows of a block: as few blocks as ``ROWS`` allows, all of one size; less than a row of each
    is padding.
    """
    blocks = -(-b // ROWS)
    return -(-b // blocks)


def _by_levels(scores: Float[Array, "b n"], k: int) -> tuple:
    b, n = scores.shape
    m = 1 << (k - 1).bit_length()
    candidates, groups = scores, None
    if n // GROUP >= 2 * m:
        _, groups = _chosen(_keys(group_maxima(scores, GROUP)), m, False)
        groups = jax.lax.optimization_barrier(jnp.sort(groups.T, axis=-1))
        candidates = _taken(scores.reshape(b, -1, GROUP), groups[:, :, None]).reshape(b, -1)
    keys, slots = (a[:k].T for a in _chosen(_keys(candidates), m, True))
    values = score_of(keys, jnp.float32).astype(scores.dtype)
    if groups is None:
        return values, slots
    return values, _taken(groups, slots // GROUP) * GROUP + slots % GROUP


def _chosen(keys: Int[Array, "b w"], m: int, in_order: bool) -> tuple:
    """(keys, positions) [m, b] of each row's m largest."""
    b, w = keys.shape
    if w % STEP or w // STEP < 2 * m:
        everyone = jax.lax.broadcasted_iota(jnp.int32, (w, b), 0)
        return largest(keys.T, everyone, m, in_order)
    _, groups = _chosen(jnp.max(keys.reshape(b, -1, STEP), axis=-1), m, False)
    members = jax.lax.broadcasted_iota(jnp.int32, (m, STEP, b), 1)
    positions = (groups[:, None] * STEP + members).reshape(-1, b)
    return largest(_taken(keys, positions.T).T, positions, m, in_order)


def _keys(scores: Float[Array, "b w"]) -> Int[Array, "b w"]:
    return jax.lax.optimization_barrier(key_of(scores.astype(jnp.float32)))


def _taken(x: jax.Array, where: jax.Array) -> jax.Array:
    where = jax.lax.optimization_barrier(where)
    taken = jnp.take_along_axis(x, where, axis=1, mode="promise_in_bounds")
    return jax.lax.optimization_barrier(taken)


def _top_k(scores, k):
    # One barrier per array: a slice of top_k's outputs in the same program would turn the TopK
    # call into a full sort (26x slower), and a barrier over the pair aborts JAX 0.10.
    values, indices = jax.lax.top_k(scores, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)
