"""Sparse decode on TPU: each slot's dictionary row is fetched from HBM by a DMA of its own.

A TPU core has no gather from memory, but its DMA engines take a row number that was computed.
Rows of the batch go through a ring of ``RING`` buffers, so that the fetches of one row run under
the arithmetic of those before it; that arithmetic is float32 on the vector unit. The matrix unit
would have to load every fetched row as weights for a single row of output.

Widths that are no multiple of 128 are padded, which copies the dictionary: pick multiples.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from saex.kernels.sparse_decode import pallas_tpu_latents as latents
from saex.kernels.sparse_decode.pallas_tpu_latents import LANES, SUBLANES, like, pad, params

ROWS = 128  # of the batch in a block: one lane each in the transposed [k, b] arrays
RING = 4  # batch rows whose fetches are in flight or in use


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """y[b] = sum_j values[b, j] rows[indices[b, j]]; slots of value 0 fetch nothing."""
    b, d = values.shape[0], rows.shape[1]
    wanted = jnp.where(values != 0, indices, -1)
    columns = pad(values, ROWS, SUBLANES).T
    y = _by_row(_decode_row, wanted, columns, pad(rows, 1, LANES), (b, d))
    return y[:b, :d]


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """dv[b, j] = <g[b], rows[indices[b, j]]>."""
    b, k = indices.shape
    dv = _by_row(_dots_row, indices, pad(g, ROWS, LANES), pad(rows, 1, LANES), (k, b))
    return dv[:k, :b].T


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """dW[i] = sum of values[b, j] g[b] over the slots with index i: one pass over the latents."""
    return latents.scatter(values, indices, g, n)


def vmem_bytes(k: int, d: int) -> int:
    """VMEM of ``decode`` and ``dots``: the ring of fetched rows, and blocks in and out, twice."""
    slots, width = -(-k // SUBLANES) * SUBLANES, -(-d // LANES) * LANES
    return 4 * (RING * slots * width + 2 * ROWS * (slots + width))


def _by_row(compute, indices, operand, rows, out):
    """``compute`` on every batch row, with the dictionary rows that it names in VMEM.

    operand, out: [k, b] or [b, d] (padded), in blocks of ROWS batch rows.
    """
    (b, k), d = indices.shape, rows.shape[1]
    slots = -(-k // SUBLANES) * SUBLANES
    # A row that only fills the last block fetches nothing.
    indices = jnp.pad(indices, ((0, -b % ROWS), (0, 0)), constant_values=-1)
    padded = indices.shape[0]
    columns = pl.BlockSpec((slots, ROWS), lambda i: (0, i))
    whole = pl.BlockSpec((ROWS, d), lambda i: (i, 0))
    transposed = compute is _decode_row
    return pl.pallas_call(
        functools.partial(_kernel, compute),
        grid=(padded // ROWS,),
        in_specs=[
            pl.BlockSpec((ROWS, k), lambda i: (i, 0), memory_space=pltpu.SMEM),
            columns if transposed else whole,
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=whole if transposed else columns,
        out_shape=like(operand, (padded, d) if transposed else (slots, padded)),
        scratch_shapes=[
            pltpu.VMEM((RING, slots, d), jnp.float32),
            pltpu.SemaphoreType.DMA((RING,)),
        ],
        compiler_params=params(vmem_bytes(k, d)),
        name=compute.__name__.strip("_"),
    )(indices, operand, rows)


def _kernel(compute, indices, operand, rows, out, ring, arrived):
    """A software pipeline over the block's rows: fetch RING - 1 ahead, wait, compute."""
    for r in range(RING - 1):
        _fetch(indices, rows, ring, arrived, r)

    @pl.loop(0, ROWS)
    def _(r):
        @pl.when(r + RING - 1 < ROWS)
        def _():
            _fetch(indices, rows, ring, arrived, r + RING - 1)

        _wait(indices, rows, ring, arrived, r)
        compute(r, operand, ring.at[r % RING], out)


def _fetch(indices, rows, ring, arrived, r):
    @pl.loop(0, indices.shape[1])
    def _(j):
        @pl.when(indices[r, j] >= 0)
        def _():
            _copy(indices[r, j], rows, ring, arrived, r, j).start()


def _wait(indices, rows, ring, arrived, r):
    @pl.loop(0, indices.shape[1])
    def _(j):
        @pl.when(indices[r, j] >= 0)
        def _():
            _copy(0, rows, ring, arrived, r, j).wait()


def _copy(index, rows, ring, arrived, r, j):
    source, slot = rows.at[pl.ds(index, 1)], r % RING
    return pltpu.make_async_copy(source, ring.at[slot, pl.ds(j, 1)], arrived.at[slot])


def _decode_row(r, values, fetched, out):
    v = _column(values[...], r)
    # A slot that was not fetched holds anything at all.
    terms = jnp.where(v != 0, v * fetched[...], 0)
    out[pl.ds(r, 1), :] = jnp.sum(terms, axis=0, keepdims=True)


def _dots_row(r, g, fetched, out):
    products = jnp.sum(fetched[...] * g[pl.ds(r, 1), :], axis=1, keepdims=True)
    lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
    out[...] = jnp.where(lane == r, products, out[...])


def _column(values, r):
    """Column r of [k, ROWS] as [k, 1]: a TPU cannot slice at a lane number that is computed."""
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.sum(jnp.where(lane == r, values, 0), axis=1, keepdims=True)
