"""Sparse decode on Hopper: one warpgroup a row, dictionary rows read straight into registers.

decode and dots walk over a row's slots; scatter walks over a latent's slots, which were sorted
before (``csc``), so that its sums are taken in a fixed order without atomics.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import csc, like
from saex.kernels.mosaic_gpu import launch, pad

PIECE = 128  # slots of a latent that one program sums; what a hot latent has more goes to others


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """y[b] = sum_j values[b, j] rows[indices[b, j]], accumulated in float32."""
    (b, k), d = values.shape, rows.shape[1]

    def body(values, indices, rows, y):
        r = jax.lax.axis_index("row")

        def add(j, total):
            return total + values[r, j] * rows[indices[r, j]].astype(jnp.float32)

        y[r] = jax.lax.fori_loop(0, k, add, jnp.zeros((rows.shape[1],), jnp.float32))

    rows = pad(rows)
    out = like(values, (b, rows.shape[1]))
    return launch(body, [out], {"row": b}, (values, indices, rows))[0][:, :d]


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """dv[b, j] = <g[b], rows[indices[b, j]]>."""
    b, k = indices.shape

    def body(indices, g, rows, dv):
        r = jax.lax.axis_index("row")
        mine = g[r].astype(jnp.float32)

        def dot(j, _):
            dv[r, j] = jnp.sum(mine * rows[indices[r, j]].astype(jnp.float32))

        jax.lax.fori_loop(0, k, dot, None)

    return launch(body, [like(g, (b, k))], {"row": b}, (indices, pad(g), pad(rows)))[0]


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """dW[i] = sum of values[b, j] g[b] over the slots with index i."""

    def add(sums, scalars, rows, latent):
        return (sums[0] + scalars[0] * rows[0],)

    g, d = pad(g), g.shape[1]
    slots = csc.sort_slots(values != 0, indices, n)
    return over_latents(add, slots, (values,), (g,), (), (g.shape[1],))[0][:, :d]


def over_latents(
    add: Callable[..., tuple],
    slots: csc.Slots,
    columns: Sequence[Float[Array, "b k"]],
    rows: Sequence[Float[Array, "b _"]],
    latents: Sequence[Float[Array, "n _"]],
    widths: Sequence[int | None],
    piece: int = PIECE,
) -> Sequence[Array]:
    """Sums over the slots of each latent, float32 [n, width] (or [n], where the width is None).

    Firing is heavy-tailed: a program takes at most ``piece`` slots. A first launch sums what the
    hot latents have beyond that, piece by piece; a second one takes each latent's first piece and
    adds the others in order.

    Args:
      add: ``add(sums, scalars, rows, latent) -> sums`` for one slot: its entries of ``columns``,
        its rows of ``rows``, and the latent's row of each of ``latents``.
      widths: of the sums.
    """
    k, n = columns[0].shape[1], slots.starts.shape[0] - 1
    columns = [column.reshape(-1)[slots.order] for column in columns]
    operands = (slots.order // k, *columns, *rows, *latents)

    # Bounds are computed (+ 0): inside a shard_map what is read from a ref is of another type (it
    # varies over the mesh's axes) than a loop's counter is after one turn.
    def total(refs, i, first, count):
        row, *scalars = refs[: 1 + len(columns)]
        batch = refs[1 + len(columns) : 1 + len(columns) + len(rows)]
        latent = [ref[i].astype(jnp.float32) for ref in refs[len(operands) - len(latents) :]]

        def step(s, sums):
            r = row[s]  # all loads before the first use of one
            mine = [ref[r].astype(jnp.float32) for ref in batch]
            return add(sums, [scalar[s] for scalar in scalars], mine, latent)

        zeros = tuple(jnp.zeros((w,) if w else (), jnp.float32) for w in widths)
        return jax.lax.fori_loop(first + 0, first + count, step, zeros)

    def pieces(owner, first, length, *refs):
        p = jax.lax.axis_index("piece")
        refs, out = refs[: len(operands)], refs[len(operands) :]
        _store(out, p, total(refs, owner[p], first[p], length[p]))

    def whole(starts, others, *refs):
        i = jax.lax.axis_index("latent")
        refs, parts, out = _split(refs, len(operands), len(widths))
        count = jnp.minimum(starts[i + 1] - starts[i], piece)
        sums = total(refs, i, starts[i], count)

        def step(p, sums):
            return tuple(s + part[p] for s, part in zip(sums, parts))

        _store(out, i, jax.lax.fori_loop(others[i] + 0, others[i + 1] + 0, step, sums))

    def out(m: int) -> list[Any]:
        return [like(columns[0], (m, w) if w else (m,)) for w in widths]

    more = csc.cut(slots.starts, piece, bound=max(columns[0].shape[0] // piece, 1), skip=1)
    tables = (more.owner, more.first, more.length)
    parts = launch(
        pieces, out(more.owner.shape[0]), {"piece": more.owner.shape[0]}, tables + operands
    )
    tables = (slots.starts, more.starts)
    return launch(whole, out(n), {"latent": n}, (*tables, *operands, *parts))


def _split(refs, a, b):
    return refs[:a], refs[a : a + b], refs[a + b :]


def _store(refs, i, sums):
    for ref, s in zip(refs, sums):
        ref[i] = s
