"""Codes of rows that need different numbers of latents, laid out in lines."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels.encode_above import Above
from saex.kernels.sparse_decode.cpu import BLOCK  # of whole ones only those in use are gone over
from saex.sae.base import RaggedCodes, SparseCodes

# Slots of a line, one for each row and others as its latents ask. Short ones waste fewer slots and
# are more, each of which moves a row of x and one of g: of 8, 16 and 32 the fastest on a CPU.
SLOTS = 16
SLOTS_OF_LEVELS = 8  # where a row has a line for each level


def laid_out(
    above: Above,
    keep: Bool[Array, "l s"],
    values: Float[Array, "l s"],
    b: int,
    room: int,
    unused: float = 0.0,
    level: Int[Array, "l s"] | None = None,
    levels: int = 1,
) -> tuple[RaggedCodes, Bool[Array, ""]]:
    """(codes, fits): the slots that are kept, in as many lines of a row as it needs.

    Args:
      above: of b rows. keep: which of its slots. values: of these slots.
      room: for so many latents in all.
      unused: the value of a slot that is not used.
      level: of each slot, 0..levels-1, which never falls along a row: no line holds slots of two.

    Returns:
      fits: whether all had room. Slots are filled from the front; a line that is used uses its
      first one.
    """
    s = SLOTS if levels == 1 else SLOTS_OF_LEVELS
    lines = -(-room // s) + b * levels
    lines += -lines % BLOCK if lines > BLOCK else 0
    group = above.rows[:, None] * levels + (0 if level is None else level)
    # kept slots of one group follow each other, if not in neighbouring places
    of = jnp.where(keep, group, b * levels).reshape(-1)
    counts = jnp.zeros((b * levels,), jnp.int32).at[of].add(1, mode="drop")
    needed = -(-counts // s)
    line_ends, ends = jnp.cumsum(needed), jnp.cumsum(counts)
    firsts, before = line_ends - needed, ends - counts
    at = jnp.minimum(of, b * levels - 1)
    rank = jnp.cumsum(keep.reshape(-1), dtype=jnp.int32) - 1 - before[at]
    place = jnp.where(keep.reshape(-1), firsts[at] * s + rank, lines * s)
    slots = jnp.arange(of.shape[0], dtype=jnp.int32)
    # of integers, and each place once: the same bits every time
    empty = jnp.full((lines * s,), of.shape[0], jnp.int32)
    slot = empty.at[place].set(slots, mode="drop", unique_indices=True)
    taken = (a.reshape(-1).at[slot] for a in (values, above.indices))
    values, indices = (a.get(mode="fill", fill_value=f) for a, f in zip(taken, (unused, 0)))
    first = jnp.where(needed > 0, firsts, lines)
    numbers = jnp.arange(b * levels, dtype=jnp.int32)
    groups = jax.lax.cummax(jnp.zeros((lines,), jnp.int32).at[first].max(numbers, mode="drop"))
    groups = jnp.where(jnp.arange(lines) < line_ends[-1], groups, b * levels)
    codes = RaggedCodes(values.reshape(-1, s), indices.reshape(-1, s), groups, b, levels)
    return codes, line_ends[-1] <= lines


def of_levels(codes: SparseCodes, level: Int[Array, "b k"], levels: int) -> RaggedCodes:
    """Slots whose level never falls along a row, in lines of one level."""
    (b, k), values = codes.values.shape, codes.values
    above = Above(values, codes.indices, jnp.arange(b, dtype=jnp.int32), jnp.bool_(True))
    return laid_out(above, values != 0, values, b, b * k, level=level, levels=levels)[0]
