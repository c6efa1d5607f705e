"""Sums over the slots that hold each latent, on TPU: sort, then one pass over tiles of latents.

The b k slots are sorted by latent (ties by row: the order of every sum is fixed). A work item is a
tile of ``TILE`` latents together with a chunk of ``CHUNK`` sorted slots that may touch it; items
come in the order of both, so a tile's sums stay in VMEM until they are whole, and each slot's row
of the batch is fetched from HBM once, by a DMA, while the item before is computed:

    slots   ..3 3 3 7 | 7 7 9 12 | 12 130 131 131 | ...        chunks, sorted by latent
    items   (tile 0, chunk 0) (0, 1) (0, 2) (1, 2) ...          every tile has one at least

Inside an item a sum over slots is a product with the [TILE, CHUNK] matrix that holds each slot's
factor in its latent's row: the matrix unit does the scatter.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from saex.kernels import like

LANES, SUBLANES = 128, 8
TILE = 128  # latents
CHUNK = 128  # slots
UNUSED = 2**30  # the latent of slots that add nothing: sorted last, in no tile


class Plan(NamedTuple):
    """Sorted slots in chunks, [chunks, 1, CHUNK], and the (tile, chunk) of every work item."""

    tile: Int[Array, " items"]
    chunk: Int[Array, " items"]
    total: Int[Array, " 1"]
    latent: Int[Array, "chunks 1 c"]
    row: Int[Array, "chunks 1 c"]
    factors: tuple[Float[Array, "chunks 1 c"], ...]


def plan(indices: Int[Array, "b k"], used: Any, factors: tuple, n: int) -> Plan:
    """Sort the slots by latent and list the work items.

    Args:
      indices: latent of each slot. used: bool [b, k]; other slots are left out.
      factors: float32 [b, k] arrays that travel with the slots.
      n: latents.
    """
    size = indices.size
    row = jnp.broadcast_to(jnp.arange(indices.shape[0])[:, None], indices.shape)
    flat = [jnp.where(used, indices, UNUSED), row, *factors]
    flat = [a.reshape(-1) for a in flat]
    fill = [UNUSED] + [0] * (len(flat) - 1)
    flat = [jnp.pad(a, (0, -size % CHUNK), constant_values=v) for a, v in zip(flat, fill)]
    latent, row, *others = jax.lax.sort(flat, num_keys=1, is_stable=True)
    chunked = [a.reshape(-1, 1, CHUNK) for a in (latent, row, *others)]
    tile, chunk, total = _items(latent, -(-n // TILE))
    return Plan(tile, chunk, total, chunked[0], chunked[1], tuple(chunked[2:]))


def _items(latent, tiles):
    """(tile, chunk) in order; each tile meets the chunks that hold slots of its latents."""
    chunks = latent.size // CHUNK
    starts = jnp.searchsorted(latent, jnp.arange(tiles + 1) * TILE)
    first = jnp.minimum(starts[:-1] // CHUNK, chunks - 1)
    last = jnp.maximum(jnp.minimum((starts[1:] - 1) // CHUNK, chunks - 1), first)
    ends = jnp.cumsum(last - first + 1)
    item = jnp.arange(tiles + chunks)  # neighbours share one chunk at most: so many, never more
    tile = jnp.minimum(jnp.searchsorted(ends, item, side="right"), tiles - 1)
    chunk = jnp.minimum(item - (ends - (last - first + 1))[tile] + first[tile], last[tile])
    return tile.astype(jnp.int32), chunk.astype(jnp.int32), ends[-1:].astype(jnp.int32)


def scatter(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], g: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """dW[i] = sum of values[b, j] g[b] over the slots with index i, float32.

    A row of g that is not finite makes all latents of the tiles that it touches NaN.
    """
    work = plan(indices, values != 0, (values,), n)
    batch = pad(g, 1, LANES)
    (dW,) = over_tiles(_scatter_item, work, batch, [], [rows_out(n, batch.shape[1])])
    return dW[:, : g.shape[1]]


def _scatter_item(here, factors, fetched, tiles, add):
    add(0, dot(jnp.where(here, factors[0][0], 0), fetched[...]))


def rows_out(n: int, width: int) -> tuple:
    """(shape, block) of a sum that has a row per latent."""
    return (n, width), (TILE, width)


def scalars_out(n: int) -> tuple:
    """(shape, block) of a sum that has a number per latent, in a tile's lane and any sublane."""
    return (-(-n // TILE) * SUBLANES, TILE), (SUBLANES, TILE)


def vmem_bytes(fetched: int, tiles: int) -> int:
    """VMEM of ``over_tiles``: fetched rows and tiles in and out, each twice and once as operands.

    Args:
      fetched: width of the rows of the batch. tiles: summed widths of a tile's rows in and out.
    """
    return 4 * 3 * (CHUNK * fetched + TILE * tiles)


def hbm_bytes(slots: int, fetched: int, tiles: int, factors: int) -> int:
    """Bytes from and to HBM of ``over_tiles``.

    Args:
      slots: b k; each brings a row of the batch, its latent, its row number (twice) and
        its factors. fetched: width of the rows of the batch.
      tiles: numbers of all tiles in and out, which come and go once. factors: of a slot.
    """
    return 4 * (slots * (fetched + 3 + factors) + tiles)


def over_tiles(compute: Any, work: Plan, batch: Any, tiles_in: list, out: list) -> Any:
    """Run ``compute`` on every work item; the sums of each tile of latents.

    Args:
      compute: (here, factors, fetched, tiles, add): ``here`` [TILE, CHUNK] says which slot holds
        which latent, ``factors`` are [1, 1, CHUNK] refs, ``fetched`` the slots' rows of ``batch``,
        ``tiles`` refs to this tile of ``tiles_in``; ``add(i, part)`` adds to the i-th sum.
      batch: float32 [b, width], fetched row by row. tiles_in: float32 [n, width] arrays.
      out: (shape, block) of each sum: ``rows_out`` or ``scalars_out``.
    """
    items = work.tile.shape[0]

    def per_chunk(ahead=0, **where):
        def index_map(i, tile, chunk, total):
            return chunk[jnp.minimum(i + ahead, items - 1)], 0, 0

        return pl.BlockSpec((1, 1, CHUNK), index_map, **where)

    def per_tile(block):
        return pl.BlockSpec(block, lambda i, tile, chunk, total: (tile[i], 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(items,),
        in_specs=[
            per_chunk(memory_space=pltpu.SMEM),
            per_chunk(1, memory_space=pltpu.SMEM),
            *[per_chunk() for _ in (work.latent, *work.factors)],
            pl.BlockSpec(memory_space=pl.ANY),
            *[per_tile((TILE, a.shape[1])) for a in tiles_in],
        ],
        out_specs=[per_tile(block) for _, block in out],
        scratch_shapes=[
            pltpu.VMEM((2, CHUNK, batch.shape[1]), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    widths = [a.shape[1] for a in tiles_in] + [shape[1] for shape, _ in out]
    numbers = sum(a.size for a in tiles_in) + sum(math.prod(shape) for shape, _ in out)
    slots, factors = work.latent.size, len(work.factors)
    return pl.pallas_call(
        functools.partial(_kernel, compute, factors, len(tiles_in)),
        grid_spec=grid,
        out_shape=[like(batch, shape) for shape, _ in out],
        compiler_params=params(vmem_bytes(batch.shape[1], sum(widths))),
        cost_estimate=pl.CostEstimate(
            flops=2 * TILE * slots * sum(widths),
            bytes_accessed=hbm_bytes(slots, batch.shape[1], numbers, factors),
            transcendentals=0,
        ),
        name=compute.__name__.strip("_"),
    )(
        *(work.tile, work.chunk, work.total, work.row, work.row, work.latent),
        *(*work.factors, batch, *tiles_in),
    )


def _kernel(compute, n_factors, n_tiles, tile, chunk, total, rows_now, rows_next, latent, *refs):
    factors, (batch, *tiles) = refs[:n_factors], refs[n_factors : n_factors + 1 + n_tiles]
    *sums, buffers, arrived = refs[n_factors + 1 + n_tiles :]
    i = pl.program_id(0)
    before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, total[0] - 1)

    @pl.when(i == 0)
    def _():
        _fetch(rows_now, batch, buffers, arrived, 0)

    @pl.when((i < total[0]) & (chunk[after] != chunk[i]))
    def _():  # chunk numbers go up by one: the buffer of the one before is free
        _fetch(rows_next, batch, buffers, arrived, chunk[after] % 2)

    slot = chunk[i] % 2

    @pl.when((i == 0) | ((i < total[0]) & (chunk[before] != chunk[i])))
    def _():  # one wait for the bytes of all CHUNK rows
        buffer = buffers.at[slot]
        pltpu.make_async_copy(buffer, buffer, arrived.at[slot]).wait()

    @pl.when((i == 0) | (tile[before] != tile[i]))
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def add(at, part):
        sums[at][...] += part

    @pl.when(i < total[0])
    def _():
        relative = latent[0] - tile[i] * TILE
        here = relative == jax.lax.broadcasted_iota(jnp.int32, (TILE, CHUNK), 0)
        compute(here, factors, buffers.at[slot], tiles, add)


def _fetch(rows, batch, buffers, arrived, slot):
    @pl.loop(0, CHUNK // SUBLANES)
    def _(group):
        for i in range(SUBLANES):  # side by side: starting a copy costs scalar instructions
            j = group * SUBLANES + i
            source, to = batch.at[pl.ds(rows[0, 0, j], 1)], buffers.at[slot, pl.ds(j, 1)]
            pltpu.make_async_copy(source, to, arrived.at[slot]).start()


def dot(a: Any, b: Any, transposed: bool = False) -> Any:
    """a b, or a b^T, of float32 in full precision on the matrix unit."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def pad(x: Num[Array, "r c"], rows: int, columns: int) -> Num[Array, "R C"]:
    """x with zeros up to the next multiples."""
    (r, c) = x.shape
    return jnp.pad(x, ((0, -r % rows), (0, -c % columns))) if r % rows or c % columns else x


SPARE = 6 << 20  # bytes of VMEM for what the compiler itself puts there


def params(vmem: int) -> pltpu.CompilerParams:
    """One grid axis, run in order, with room for ``vmem`` bytes and the compiler's own."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",),
        vmem_limit_bytes=vmem + SPARE,
        disable_bounds_checks=True,  # half of the instructions that start a copy
    )
