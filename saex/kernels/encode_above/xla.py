"""encode_above for XLA: a bit for each score, and the places of the bits that are set.

Scores are held a block of rows at a time, and read twice: to compare them, and where they are
above. All that is done for each latent is one comparison; what follows is done for 32 of them, or
for those that are above. On two cores it takes about as long as the 32 largest of each row,
which is mostly the matmul (``experiments/benchmarks/results/ops_cpu_selection.md``).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from saex.kernels.encode_topk import xla_gpu
from saex.kernels.encode_topk.reference import pre_activations
from saex.kernels.topk import cpu

WORD = 32  # bits


def on_cpu(x, b_pre, W_enc, b_enc, least, room, matmul_dtype):
    """(values, indices, rows, whole); blocks as those of ``encode_topk``, which stay in cache."""
    rows = cpu.block_rows(x.shape[0])
    return _by_blocks(x, b_pre, W_enc, b_enc, least, room, matmul_dtype, rows)


def on_gpu(x, b_pre, W_enc, b_enc, least, room, matmul_dtype):
    """The same; blocks of some gigabytes, in which an int32 tells every place."""
    blocks = -(-x.shape[0] // max(xla_gpu.BYTES // (4 * W_enc.shape[0]), 1))
    rows = -(-x.shape[0] // blocks)
    return _by_blocks(x, b_pre, W_enc, b_enc, least, room, matmul_dtype, rows)


def _by_blocks(x, b_pre, W_enc, b_enc, least, room, matmul_dtype, rows):
    """Lines of one slot, of blocks of so many rows; ``room`` is that of each block."""
    (b, d), n = x.shape, W_enc.shape[0]
    blocks = jnp.pad(x, ((0, -b % rows), (0, 0))).reshape(-1, rows, d)
    firsts = jnp.arange(len(blocks), dtype=jnp.int32) * rows

    def block(args):
        x, first = args
        p = jax.lax.optimization_barrier(pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype))
        real = first + jnp.arange(rows) < b
        above = ~(p <= least[None]) & real[:, None]
        place, count = _set_bits(_words(above), rows * room)
        row, latent = place // (-(-n // WORD) * WORD), place % (-(-n // WORD) * WORD)
        used = jnp.arange(rows * room) < count
        values = p.ravel().at[row * n + latent].get(mode="clip")
        return (
            jnp.where(used, values, -jnp.inf),
            jnp.where(used, latent, 0),
            jnp.where(used, first + row, b),
            count,
        )

    if len(blocks) == 1:
        values, latents, of, count = (a[None] for a in block((blocks[0], firsts[0])))
    else:
        values, latents, of, count = jax.lax.map(block, (blocks, firsts))
    whole = jnp.all(count <= rows * room)
    return values.reshape(-1, 1), latents.reshape(-1, 1), of.reshape(-1), whole


def _words(above: Bool[Array, "r n"]) -> UInt[Array, " m"]:
    """uint32: 32 latents of a row each, filled up with zeros."""
    above = jnp.pad(above, ((0, 0), (0, -above.shape[1] % WORD))).reshape(-1, WORD)
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    words = jnp.sum(jnp.where(above, bits[None], jnp.uint32(0)), axis=1, dtype=jnp.uint32)
    return jax.lax.optimization_barrier(words)


def _set_bits(words: UInt[Array, " m"], size: int) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """(places, count): where the first ``size`` bits that are set lie, and how many are."""
    counts = jax.lax.population_count(words).astype(jnp.int32)
    ends = jax.lax.optimization_barrier(jnp.cumsum(counts))
    starts = ends - counts
    # each word says at the first of its bits who it is, and the next bits hear it
    first = jnp.where(counts > 0, starts, size)
    numbers = jnp.arange(words.shape[0], dtype=jnp.int32)
    word = jax.lax.cummax(jnp.zeros((size,), jnp.int32).at[first].max(numbers, mode="drop"))
    rank, bits = jnp.arange(size, dtype=jnp.int32) - starts[word], words[word]
    place = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):  # does it lie in the lower half?
        part = jnp.right_shift(bits, place.astype(jnp.uint32)) & jnp.uint32(2**half - 1)
        below = jax.lax.population_count(part).astype(jnp.int32)
        beyond = rank >= below
        rank, place = rank - jnp.where(beyond, below, 0), place + jnp.where(beyond, half, 0)
    return word * WORD + jnp.minimum(place, WORD - 1), ends[-1]
