"""The forms that XLA on CPU runs well (measured; the einsum forms hold [b, k, d] and cost 3x).

decode: an unrolled sum, whose gathers fuse into the adds. dots: a loop over the k slots.
scatter: slots sorted by latent, and then sums of gathered rows, since a gather runs on all threads
and writes each sum once, a scatter-add runs on one. With less than a slot to a latent, where most
sums would be empty: a loop of scatter-adds. The last two, where there are few latents to a slot:
products of whole matrices, a block of rows at a time. Lines: some at a time (``BLOCK``, ``CHUNK``),
up to the last that is used, since what they have in x would be an array several times as large.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import zeros_as
from saex.kernels.topk.cpu import block_rows

UNROLL = 32  # slots whose gathers are fused into one loop over the rows
BLOCK = 1024  # lines
CHUNK = 1 << 17  # slots of lines that are sorted at once
LIST = 16  # slots of a latent that are summed at once, twice as many where that is their mean
# Latents to a slot of a row up to which whole products are faster: scatters of 4096 rows, d 256 and
# k 32 take 0.55 of the time with 256 latents, as long with 512, 1.5 with 1024, dots 0.3, 0.5, 0.8.
NARROW = 16


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """Unrolled in blocks of ``UNROLL`` slots."""
    # made before: fused into the sums, what made a value would be done again for each of d
    values, indices = jax.lax.optimization_barrier((values, indices))
    y = jnp.zeros((values.shape[0], rows.shape[1]), jnp.float32)
    for start in range(0, values.shape[1], UNROLL):
        part = slice(start, start + UNROLL)
        y = jax.lax.optimization_barrier(_added(y, values[:, part], indices[:, part], rows))
    return y


def _added(y, values, indices, rows):
    for j in range(values.shape[1]):
        y = y + values[:, j, None] * rows[indices[:, j]]
    return y


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """One gather and one row-wise product at a time."""
    if rows.shape[0] <= NARROW * indices.shape[1]:
        return _dots_densely(indices, g, rows)
    return jax.lax.map(lambda i: jnp.einsum("bd,bd->b", g, rows[i]), indices.T).T


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """One of ``scatters``."""
    return scatters([(values, g)], indices, n)[0]


def scatters(terms, indices, n):
    """[n, d] for each of (values [b, k], g [b, d]), of the same slots, which are sorted once.

    Where the first's value is 0 the others' are 0 too: such slots may be left out.
    """
    if n <= NARROW * indices.shape[1]:
        return [_scatter_densely(values, indices, g, n) for values, g in terms]
    each = jnp.arange(len(indices), dtype=jnp.int32)
    return _scatters([(values, g, each) for values, g in terms], indices, n, indices.size)


def _dots_densely(indices, g, rows):
    def block(args):
        indices, g = args
        p = jax.lax.optimization_barrier(jnp.einsum("bd,nd->bn", g, rows))
        return jnp.take_along_axis(p, indices, axis=1)

    made = jax.lax.map(block, _blocks(indices, g))
    return made.reshape(-1, indices.shape[1])[: len(indices)]


def _scatter_densely(values, indices, g, n):
    def add(total, args):
        values, indices, g = args
        each = jnp.arange(len(values), dtype=jnp.int32)[:, None]
        codes = zeros_as((len(values), n), values).at[each, indices].add(values)
        made = jnp.einsum("bn,bd->nd", jax.lax.optimization_barrier(codes), g)
        return total + jax.lax.optimization_barrier(made), None

    return jax.lax.scan(add, zeros_as((n, g.shape[-1]), g), _blocks(values, indices, g))[0]


def _blocks(*arrays):
    """[b, c] arrays as [m, rows, c], filled up with zeros."""
    b = len(arrays[0])
    size = block_rows(max(b, 1))
    return tuple(jnp.pad(a, ((0, -b % size), (0, 0))).reshape(-1, size, a.shape[1]) for a in arrays)


def _scatters(terms, indices, n, most):
    """Sums of (values, g, owner) each, at most ``most`` slots at once, up to the last in use."""
    lines, width = indices.shape
    at_once = sorted_at_once(min(most, lines * width), n)
    if at_once < width:
        return [_scatter_slots(values, g, owner, indices, n) for values, g, owner in terms]
    values, g, owner = terms[0]
    used = (values != 0) & (owner < len(g))[:, None] & (indices >= 0) & (indices < n)
    part = lines if lines * width == at_once else at_once // width
    totals = tuple(zeros_as((n, g.shape[-1]), g) for _, g, _ in terms)
    if part == lines:
        return _add_sorted(totals, terms, indices, used)

    def parts(a):
        a = jnp.pad(a, ((0, -lines % part), *[(0, 0)] * (a.ndim - 1)))
        return a.reshape(-1, part, *a.shape[1:])

    indices, used, each = jax.tree.map(parts, (indices, used, [(v, o) for v, _, o in terms]))

    def add(i, totals):
        mine = [(v[i], g, o[i]) for (v, o), (_, g, _) in zip(each, terms, strict=True)]
        return _add_sorted(totals, mine, indices[i], used[i])

    last = jnp.max(jnp.where(jnp.any(used, (1, 2)), jnp.arange(1, len(used) + 1), 0))
    return jax.lax.fori_loop(0, last, add, totals)


def sorted_at_once(slots: int, n: int) -> int:
    """How many of them; 0: none, since there is less than one to a latent."""
    most = min(slots, 2**32 >> (n - 1).bit_length())  # a slot and its latent are one number
    return most if most >= n else 0


def _add_sorted(totals, terms, indices, used):
    """Once sorted a latent's slots follow each other.

    The first ``size`` of every latent are summed at once; what popular ones have beyond is cut into
    further lines, which are summed and added.
    """
    n, m, width = len(totals[0]), indices.size, indices.shape[1]
    bits = (m - 1).bit_length()
    slot = jnp.arange(m, dtype=jnp.uint32).reshape(indices.shape)
    # sorting pairs takes four times as long
    keys = jnp.where(used, indices.astype(jnp.uint32) << bits | slot, jnp.uint32(2**32 - 1))
    keys = jnp.sort(keys.reshape(-1))
    slots = jnp.minimum((keys & (2**bits - 1)).astype(jnp.int32), m - 1)
    start = jnp.searchsorted(keys >> bits, jnp.arange(n, dtype=jnp.uint32)).astype(jnp.int32)
    stop = jnp.append(start[1:], jnp.sum(used, dtype=jnp.int32))
    size = 2 * LIST if m >= LIST * n else LIST
    ends = jnp.cumsum(jnp.maximum(stop - start - 1, 0) // size)  # of each latent's further lines
    count = max(m // size, 1)
    line = jnp.arange(count + -count % min(count, BLOCK), dtype=jnp.int32)
    latent = jnp.searchsorted(ends, line, side="right").astype(jnp.int32)
    of = jnp.minimum(latent, n - 1)
    further = start[of] + (line - jnp.append(0, ends)[of] + 1) * size

    def sums(total, start, stop, values, g, owner):
        at = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        # beyond its last slot that one again, so that no other's row, which may be NaN, is in it
        slot = slots[jnp.clip(at, 0, stop[:, None] - 1)]
        v = jnp.where(at < stop[:, None], values.reshape(-1)[slot], 0)
        v, rows = v.astype(total.dtype), owner[slot // width]
        v, rows = jax.lax.optimization_barrier((v, rows))  # as in ``decode``
        y = jnp.where((start < stop)[:, None], _added(total, v, rows, g), total)
        return jax.lax.optimization_barrier(y)

    def added(total, term):
        def block(total, latent, at, stop):
            none = jnp.zeros((len(at), total.shape[1]), total.dtype)
            return total.at[latent].add(sums(none, at, stop, *term), mode="drop")

        total = sums(total, start, stop, *term)
        return _over_blocks(block, total, latent, n, latent, further, stop[of])

    return tuple(added(total, term) for total, term in zip(totals, terms, strict=True))


def _scatter_slots(values, g, owner, indices, n):
    """One slot of every line at a time."""

    def block(total, values, indices, owner):
        g_ = jax.lax.optimization_barrier(_taken(g, owner))

        def add(total, slot):
            v, i = slot
            return total.at[i].add(v[:, None] * g_), None

        return jax.lax.scan(add, total, (values.T, indices.T))[0]

    total = zeros_as((n, g.shape[-1]), g)
    return _over_blocks(block, total, owner, len(g), values, indices, owner)


def decode_lines(values, indices, rows, owner, b):
    """As ``sparse_decode.decode_lines``."""

    def block(y, values, indices, owner):
        return y.at[owner].add(decode(values, indices, rows), mode="drop")

    y = zeros_as((b, rows.shape[1]), rows, jnp.float32)
    return _over_blocks(block, y, owner, b, values, indices, owner)


def dots_lines(indices, g, rows, owner):
    """As ``sparse_decode.dots_lines``."""

    def block(out, at, indices, owner):
        made = dots(indices, _taken(g, owner), rows)
        return jax.lax.dynamic_update_slice_in_dim(out, made, at[0], axis=0)

    at = jnp.arange(len(indices), dtype=jnp.int32)
    out = zeros_as(indices.shape, g)
    return _over_blocks(block, out, owner, g.shape[0], at, indices, owner)


def scatter_lines(values, indices, g, owner, n):
    """As ``sparse_decode.scatter_lines``."""
    return scatters_lines([(values, g, owner)], indices, n)[0]


def scatters_lines(terms, indices, n):
    """``scatters`` of lines: each of (values [v, s], g [b, d], owner [v])."""
    return _scatters(terms, indices, n, CHUNK)


def _taken(x, owner):
    return x.at[owner].get(mode="fill", fill_value=0)


def _over_blocks(step: Callable, carry: jax.Array, owner: jax.Array, b: int, *arrays) -> jax.Array:
    """``step(carry, *arrays)`` for blocks of lines, up to the last line that is somebody's."""
    lines = owner.shape[0]
    if not lines:
        return carry
    size = BLOCK if lines % BLOCK == 0 else lines
    used = (jnp.sum(owner < b, dtype=jnp.int32) + size - 1) // size

    def body(i, carry):
        parts = (jax.lax.dynamic_slice_in_dim(a, i * size, size) for a in arrays)
        return step(carry, *parts)

    return jax.lax.fori_loop(0, used, body, carry)
