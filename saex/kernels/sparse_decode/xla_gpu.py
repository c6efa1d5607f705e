"""The forms that XLA on GPU compiles to gathers and sums, without atomics.

decode: an unrolled sum whose gathers fuse into the adds (no [b, k, d]; two kernels). dots: a
product and a sum, one kernel. scatter: slots sorted by latent, then decodes over tables of
neighbours, so that its order of summation is fixed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import csc, zeros_as

UNROLL = 32  # slots of one kernel; of 64 XLA makes several, with sums of [b, d] between them


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """Unrolled over at most ``UNROLL`` slots at a time."""
    b, k = values.shape
    if k <= UNROLL:
        return _sum(values, indices, rows)
    blocks = -(-k // UNROLL)
    room = ((0, 0), (0, blocks * UNROLL - k))
    values, indices = (
        jnp.pad(a, room).reshape(b, blocks, UNROLL).swapaxes(0, 1) for a in (values, indices)
    )

    def add(y, block):
        return y + _sum(block[0], block[1], rows), None

    return jax.lax.scan(add, zeros_as((b, rows.shape[1]), values), (values, indices))[0]


def _sum(values, indices, rows):
    # Flat positions: slices of [b, k] along k would become a kernel each.
    b, k = values.shape
    flat_values, flat_indices = values.reshape(-1), indices.reshape(-1)
    start = jnp.arange(b) * k
    y = jnp.zeros((), jnp.float32)
    for j in range(k):
        v, i = _take(flat_values, start + j), _take(flat_indices, start + j)
        y = y + v[:, None] * _take(rows, i)
    return y


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """The gather fuses into the sum over d."""
    return jnp.sum(g[:, None, :] * _take(rows, indices), axis=-1)


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """One sort of b * k keys, and sums over neighbours."""
    slots = csc.sort_slots(values != 0, indices, n)
    weights = _take(values.reshape(-1), slots.order)
    row = slots.order // values.shape[1]
    return segment_sums(weights, row, g, slots.starts, longest=row.shape[0])


def sums(values: Float[Array, "b k"], indices: Int[Array, "b k"], n: int) -> Float[Array, " n"]:
    """``scatter`` of one column of ones."""
    slots = csc.sort_slots(values != 0, indices, n)
    sorted_values = _take(values.reshape(-1), slots.order)[:, None]
    one = jnp.ones((), values.dtype)
    return segment_sums(one, None, sorted_values, slots.starts, longest=values.size)[:, 0]


def segment_sums(
    weights: Float[Array, "*m"],
    members: Int[Array, " m"] | None,
    rows: Float[Array, "r d"],
    starts: Int[Array, " n1"],
    longest: int,
) -> Float[Array, "n d"]:
    """out[i] = sum of weights[s] rows[members[s]] over s in starts[i] .. starts[i + 1] - 1.

    Firing is heavy-tailed: the first slots of each segment are summed at once, as a decode over a
    table of neighbours; what is longer is cut into pieces, and the pieces' sums are segments again.

    Args:
      weights: of the slots, or one scalar for all.
      members: the row of each slot; None: slot s is row s.
      longest: no segment has more slots than this.
    """
    n, m = starts.shape[0] - 1, rows.shape[0] if members is None else members.shape[0]
    length = _piece(m, n)
    y = _neighbours(weights, members, rows, starts[:-1], starts[1:] - starts[:-1], length, longest)
    if longest <= length:
        return y
    pieces = csc.cut(starts, length, bound=max(m // length, 1), skip=1)
    parts = _neighbours(weights, members, rows, pieces.first, pieces.length, length, length)
    one = jnp.ones((), rows.dtype)
    return y + segment_sums(one, None, parts, pieces.starts, -(-longest // length) - 1)


def _piece(m, n):
    """Slots of a piece: about twice as many as a latent has. Unused ones cost as much as used."""
    return min(max(2 * (1 << (m // n).bit_length() - 1) if m >= n else 2, 8), 32)


def _neighbours(weights, members, rows, first, count, length, longest):
    """For each segment the weighted sum of the rows of its first ``length`` slots."""
    offsets = jnp.arange(min(length, longest), dtype=jnp.int32)[None]
    # beyond a segment's end its last slot is read again, with weight 0: no foreign row is touched
    slots = first[:, None] + jnp.clip(count[:, None] - 1, 0, offsets)
    weights = jnp.where(offsets < count[:, None], _take(weights, slots), 0)
    return _sum(weights, slots if members is None else _take(members, slots), rows)


def _take(a, where):
    return a if a.ndim == 0 else a.at[where].get(mode="clip")
