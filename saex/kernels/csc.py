"""Sparse codes sorted by latent, so that sums over a latent are taken in a fixed order.

A scatter-add on a GPU is atomic: its order, and so its last bits, differ from run to run, and it
is slow where a latent fires often. Here the b * k slots are sorted once by latent, rows ascending
within one, and every sum over a latent runs over neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Slots(NamedTuple):
    """The slots in use, latent by latent.

    order: int32 [m]; the flat position (row * k + j) of each, of those in use first.
    starts: int32 [n + 1]; latent i has the sorted slots starts[i] .. starts[i + 1] - 1.
    """

    order: Array
    starts: Array


class Pieces(NamedTuple):
    """Segments cut into pieces of a bounded length.

    owner, first, length: int32 [p]; latent, first slot and number of slots of each piece. Pieces
      beyond the last one have length 0.
    starts: int32 [n + 1]; latent i has the pieces starts[i] .. starts[i + 1] - 1.
    """

    owner: Array
    first: Array
    length: Array
    starts: Array


def sort_slots(used: Bool[Array, "b k"], indices: Int[Array, "b k"], n: int) -> Slots:
    """Sort by latent; stable, so rows ascend within a latent. Unused slots come last."""
    keys = jnp.where(used, indices, n).reshape(-1).astype(jnp.int32)
    positions = jnp.arange(keys.shape[0], dtype=jnp.int32)
    keys, order = jax.lax.sort((keys, positions), num_keys=1, is_stable=True)
    return Slots(order, first_at_least(keys, n + 1))


def cut(starts: Int[Array, " n1"], length: int, bound: int, skip: int = 0) -> Pieces:
    """Cut every segment into pieces of at most ``length`` slots.

    Args:
      starts: of segments, as in ``Slots``.
      bound: how many pieces to make room for: m // length + min(n, m) hold those of m slots of n
        latents, and m // length what is left of them after one of each.
      skip: pieces of each segment to leave out, from its beginning.
    """
    counts = starts[1:] - starts[:-1]
    pieces = jnp.maximum(-(-counts // length) - skip, 0)
    ends = jnp.cumsum(pieces, dtype=jnp.int32)
    new_starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    # the owner of piece c is the last latent whose pieces begin at or before c
    c = jnp.arange(bound, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, c, side="right", method="scan_unrolled").astype(jnp.int32)
    owner = jnp.minimum(owner, counts.shape[0] - 1)
    first = starts[owner] + (c - new_starts[owner] + skip) * length
    left = jnp.clip(starts[owner + 1] - first, 0, length)
    return Pieces(owner, jnp.minimum(first, starts[-1]), left, new_starts)


def first_at_least(keys: Int[Array, " m"], n: int) -> Int[Array, " n"]:
    """For 0..n-1 the position of the first of the sorted ``keys`` that is at least as large."""
    wanted = jnp.arange(n, dtype=keys.dtype)
    return jnp.searchsorted(keys, wanted, method="scan_unrolled").astype(jnp.int32)
