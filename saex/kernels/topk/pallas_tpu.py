"""top_k on TPU: one pass over the scores, binned and checked; see ``pallas_tpu_bins``."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from saex.kernels.topk import pallas_tpu_bins as bins
from saex.kernels.topk import reference

FALLBACK = 2**24  # scores that are selected from at once where the check fails


def top_k(scores: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Exact; float32 or bfloat16. Where the check fails for a row, XLA's own TopK does the batch.

    k above 256 goes to XLA's TopK at once.
    """
    b, n = scores.shape
    if k > bins.MAX_K:
        return reference.top_k(scores, k)
    values, indices, exact = bins.select(
        *(tile_of, [scores], [block(b, n, k)], jax.typeof(scores), n, k, bins.COLUMNS),
        need=2 * bins.ROWS * bins.COLUMNS * scores.dtype.itemsize,
        moved=hbm_bytes(b, n, k, scores.dtype.itemsize),
    )
    chosen = values.astype(scores.dtype), indices
    if bins.always_exact(n, k):
        return chosen
    return jax.lax.cond(exact, lambda: chosen, lambda: by_blocks(top_k_of(k), scores, n))


def hbm_bytes(b: int, n: int, k: int, itemsize: int) -> int:
    """Bytes from and to HBM: the scores once, values and columns."""
    return itemsize * b * n + 8 * b * k


def block(b: int, n: int, k: int) -> pl.BlockSpec:
    """A tile of the scores."""
    return pl.BlockSpec(bins.tile(b, n, k, bins.COLUMNS), lambda i, j: (i, j))


def tile_of(scores: Any) -> Any:
    """The scores of a block in float32, as which they are compared."""
    return scores[...].astype(jnp.float32)


def top_k_of(k: int):
    """The definition, for blocks of rows."""
    return lambda scores: reference.top_k(scores, k)


def by_blocks(select, rows, n: int):
    """``select`` on blocks of rows with about ``FALLBACK`` scores each, so that it needs little
    memory: it is hardly ever run, but its room is taken always.
    """
    b = rows.shape[0]
    size = min(max(1 << (FALLBACK // n).bit_length() - 1, 8), b)
    blocks = jnp.pad(rows, ((0, -b % size), (0, 0))).reshape(-1, size, rows.shape[1])
    chosen = jax.lax.map(select, blocks)
    return tuple(a.reshape(-1, a.shape[-1])[:b] for a in chosen)
