"""Sparse decode on TPU: each slot's dictionary row is fetched from HBM by a DMA of its own.

A TPU core has no gather from memory, but its DMA engines take a row number that was computed.
What costs is the scalar work to start a fetch: slots are fetched in groups of eight, up to the last
one in use, without a branch, and each group is waited for at once.
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

from saex.kernels import like
from saex.kernels.sparse_decode import pallas_tpu_latents as latents
from saex.kernels.sparse_decode.pallas_tpu_latents import LANES, SUBLANES, pad, params

ROWS = 128  # of the batch in a block: one lane each in the transposed [k, b] arrays
RING = 4  # batch rows whose fetches are in flight or in use


def decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], rows: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """y[b] = sum_j values[b, j] rows[indices[b, j]]; nothing is fetched behind a row's last slot
    of a value that is not 0.
    """
    (b, k), d = values.shape, rows.shape[1]
    used = jnp.max(jnp.where(values != 0, jnp.arange(1, k + 1)[None], 0), axis=1)
    columns = pad(values, ROWS, SUBLANES).T
    y = _by_row(_decode_row, indices, used, columns, pad(rows, 1, LANES))
    return y[:b, :d]


def dots(
    indices: Int[Array, "b k"], g: Float[Array, "b d"], rows: Float[Array, "n d"]
) -> Float[Array, "b k"]:
    """dv[b, j] = <g[b], rows[indices[b, j]]>."""
    b, k = indices.shape
    all_used = jnp.full((b,), k, jnp.int32)
    dv = _by_row(_dots_row, indices, all_used, pad(g, ROWS, LANES), pad(rows, 1, LANES))
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


def hbm_bytes(b: int, k: int, d: int) -> int:
    """Bytes from and to HBM of ``decode`` and ``dots`` with all slots in use: a dictionary row for
    each slot, a row of the batch, and what comes with a slot.
    """
    return 4 * (b * k * d + b * d + 2 * b * k)


def _by_row(compute, indices, used, operand, rows):
    """``compute`` on every batch row, with the dictionary rows that it names in VMEM.

    used: of a row's slots, the leading ones. operand: [k, b] or [b, d], padded, taken in blocks
    of ROWS batch rows; what comes out is the other of the two.
    """
    k, d = indices.shape[1], rows.shape[1]
    slots = -(-k // SUBLANES) * SUBLANES
    groups = -(-used // SUBLANES)
    indices = pad(jnp.pad(indices, ((0, 0), (0, slots - k))), ROWS, 1)
    wanted = jnp.concatenate([indices, pad(groups[:, None], ROWS, 1)], axis=1)
    padded = indices.shape[0]
    columns = pl.BlockSpec((slots, ROWS), lambda i: (0, i))
    whole = pl.BlockSpec((ROWS, d), lambda i: (i, 0))
    transposed = compute is _decode_row
    return pl.pallas_call(
        functools.partial(_kernel, compute),
        grid=(padded // ROWS,),
        in_specs=[
            pl.BlockSpec((ROWS, slots + 1), lambda i: (i, 0), memory_space=pltpu.SMEM),
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
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * k * d,
            bytes_accessed=hbm_bytes(padded, k, d),
            transcendentals=0,
        ),
        name=compute.__name__.strip("_"),
    )(wanted, operand, rows)


def _kernel(compute, wanted, operand, rows, out, ring, arrived):
    """A software pipeline over the block's rows: fetch RING - 1 ahead, wait, compute."""
    for r in range(RING - 1):
        _fetch(wanted, rows, ring, arrived, r)

    @pl.loop(0, ROWS)
    def _(r):
        @pl.when(r + RING - 1 < ROWS)
        def _():
            _fetch(wanted, rows, ring, arrived, r + RING - 1)

        _wait(wanted, ring, arrived, r)
        compute(r, operand, ring.at[r % RING], out)


def _fetch(wanted, rows, ring, arrived, r):
    """Start a copy for every slot of row r, group by group; the last column counts the groups."""
    slot = r % RING

    @pl.loop(0, wanted[r, wanted.shape[1] - 1])
    def _(group):
        for i in range(SUBLANES):
            j = group * SUBLANES + i
            source, to = rows.at[pl.ds(wanted[r, j], 1)], ring.at[slot, pl.ds(j, 1)]
            pltpu.make_async_copy(source, to, arrived.at[slot]).start()


def _wait(wanted, ring, arrived, r):
    slot = r % RING

    @pl.loop(0, wanted[r, wanted.shape[1] - 1])
    def _(group):
        rows = ring.at[slot, pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)]
        pltpu.make_async_copy(rows, rows, arrived.at[slot]).wait()  # as many bytes


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
