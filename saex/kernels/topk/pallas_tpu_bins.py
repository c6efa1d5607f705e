"""Exact top k of each row in one pass over tiles of its scores, on TPU: binned, then checked.

Column c of a row belongs to bin c mod G. A bin keeps its ``DEPTH`` best columns, in order, in
VMEM; at the end the k best of all bins are taken one by one. That is the row's top k unless a bin
gave all that it had and more columns lay in it: then the kernel says so, and the caller selects in
another way. With G >= 4 k, columns at random fill a bin with probability G * 3e-10 a row. (Binned
running top-m with a check is tallax's idea; k bins' maxima is ``jax.lax.approx_max_k``'s.)

Scores are compared as integers (``order.key_of``): NaN above all, -0 equal to 0. A bin's later
column comes after its equals, and among bins the lowest column wins.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from saex.kernels.topk.order import key_of, score_of

LANES, SUBLANES = 128, 8
DEPTH = 8
ROWS = 256  # of a block
COLUMNS = 1024  # of a tile, at most
EMPTY = -(2**31)  # below the key of every score
LAST = 2**31 - 1  # behind every column
MAX_K = 256  # more would not leave room for 4 k bins
SPARE = 8 << 20  # bytes of VMEM for what the compiler itself puts there


def bins(k: int) -> int:
    """The number of bins: a power of two, at least 4 k, one lane each."""
    return max(LANES, 1 << (4 * k - 1).bit_length())


def always_exact(n: int, k: int) -> bool:
    """Whether no bin can overflow."""
    return n <= DEPTH * bins(k)


def tile(b: int, n: int, k: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    bound = -(-n // bins(k)) * bins(k)
    return min(ROWS, -(-b // 16) * 16), min(max(columns, bins(k)), bound)


def vmem_bytes(b: int, n: int, k: int, columns: int) -> int:
    """VMEM of the selection: bins and their heads; a tile's scores and keys; blocks out."""
    rows, columns = tile(b, n, k, columns)
    out = 2 * 2 * rows * max(k, LANES) + 2 * SUBLANES * LANES
    return 4 * (rows * (bins(k) * (2 * DEPTH + 3) + 2 * columns) + out)


def select(
    score: Any,
    operands: list,
    specs: list,
    like: Any,
    n: int,
    k: int,
    columns: int,
    need: int,
    moved: int,
    flops: int = 0,
) -> tuple[Any, Any, Any]:
    """Values [b, k] float32, columns [b, k] int32, and whether all rows are exact (a bool).

    Args:
      score: operands' refs -> float32 scores [rows, columns] of one tile.
      operands, specs: its arrays and their blocks, over the grid (tiles of rows, of columns).
      like: [b, n] shape and the mesh axes that the rows vary over.
      columns: of a tile, at most. need: bytes of VMEM that the operands' blocks take.
      moved: bytes from and to HBM. flops: of ``score``, over all tiles.
    """
    b = like.shape[0]
    rows, columns = tile(b, n, k, columns)
    grid = (-(-b // rows), -(-n // columns))
    best = pl.BlockSpec((rows, k), lambda i, j: (i, 0))
    flag = pl.BlockSpec((SUBLANES, LANES), lambda i, j: (i, 0))
    axes = like.manual_axis_type
    out = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, manual_axis_type=axes)  # noqa: E731
    state = pltpu.VMEM((DEPTH, rows, bins(k)), jnp.int32)
    row_state = pltpu.VMEM((rows, bins(k)), jnp.int32)
    keys, indices, overflow = pl.pallas_call(
        functools.partial(_kernel, score, len(operands), b, n),
        grid=grid,
        in_specs=specs,
        out_specs=[best, best, flag],
        out_shape=[out((b, k)), out((b, k)), out((grid[0] * SUBLANES, LANES))],
        scratch_shapes=[
            pltpu.VMEM((rows, columns), jnp.int32),
            *(state, state),
            *(row_state, row_state, row_state),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=int(1.2 * (need + vmem_bytes(b, n, k, columns))) + SPARE,
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        name="binned_top_k",
    )(*operands)
    exact = jnp.array(True) if always_exact(n, k) else jnp.max(overflow) == 0
    return score_of(keys, jnp.float32), indices, exact


def _kernel(score, n_operands, b, n, *refs):
    operands, (values, indices, overflow) = refs[:n_operands], refs[n_operands : n_operands + 3]
    scores, keys, slabs, *heads = refs[n_operands + 3 :]
    j = pl.program_id(1)
    columns, width = scores.shape[1], keys.shape[2]

    @pl.when(j == 0)
    def _():
        keys[...] = jnp.full_like(keys, EMPTY)
        slabs[...] = jnp.zeros_like(slabs)

    tile_keys = key_of(score(*operands))
    if n % columns:
        column = jax.lax.broadcasted_iota(jnp.int32, tile_keys.shape, 1) + j * columns
        tile_keys = jnp.where(column < n, tile_keys, EMPTY)
    scores[...] = tile_keys
    _insert(scores, keys, slabs, j * (columns // width))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        _take(keys, slabs, heads, values, indices)
        row = jax.lax.broadcasted_iota(jnp.int32, heads[0].shape, 0)
        real = row + pl.program_id(0) * heads[0].shape[0] < b
        empty = jnp.where(real & (heads[0][...] == EMPTY), 1, 0)
        overflow[...] = jnp.broadcast_to(jnp.max(empty), overflow.shape)


def _insert(scores, keys, slabs, first):
    """Put a tile's slabs of G columns into the bins; a block of them stays in registers."""
    rows, width = scores.shape[0], keys.shape[2]

    @pl.loop(0, rows // SUBLANES)
    def _(group):
        at = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        for lane in range(0, width, LANES):
            lanes = pl.ds(lane, LANES)
            kept = [(keys[m, at, lanes], slabs[m, at, lanes]) for m in range(DEPTH)]
            for s in range(scores.shape[1] // width):
                new = scores[at, pl.ds(s * width + lane, LANES)]
                kept = _inserted(kept, new, first + s)
            for m, (key, slab) in enumerate(kept):
                keys[m, at, lanes], slabs[m, at, lanes] = key, slab


def _inserted(kept, new, slab):
    """The bins with a column more; it goes behind its equals, which came earlier."""
    item = new, jnp.full(new.shape, slab, jnp.int32)
    wins = [new > key for key, _ in kept]
    first = _where(wins[0], item, kept[0])
    rest = [
        _where(wins[m], _where(wins[m - 1], kept[m - 1], item), kept[m])
        for m in range(1, len(kept))
    ]
    return [first, *rest]


def _where(condition, yes, no):
    return tuple(jnp.where(condition, a, b) for a, b in zip(yes, no))


def _take(keys, slabs, heads, values, indices):
    """The k best, one after the other: the best of the bins' heads, then that bin's next."""
    head, column, depth = heads
    depth[...] = jnp.zeros_like(depth)
    head[...], column[...] = keys[0], _column(slabs[0])

    @pl.loop(0, values.shape[1])
    def _(i):
        best = jnp.max(head[...], axis=1, keepdims=True)
        candidates = jnp.where(head[...] == best, column[...], LAST)
        chosen = jnp.min(candidates, axis=1, keepdims=True)
        here = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) == i
        values[...] = jnp.where(here, best, values[...])
        indices[...] = jnp.where(here, chosen, indices[...])
        depth[...] += jnp.where((candidates == chosen) & (candidates < LAST), 1, 0)
        key, slab = jnp.full_like(head, EMPTY), jnp.zeros_like(head)
        for m in range(DEPTH):
            at = depth[...] == m
            key, slab = jnp.where(at, keys[m], key), jnp.where(at, slabs[m], slab)
        head[...], column[...] = key, _column(slab)


def _column(slab):
    return slab * slab.shape[1] + jax.lax.broadcasted_iota(jnp.int32, slab.shape, 1)
