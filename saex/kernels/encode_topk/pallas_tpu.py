"""encode_topk on TPU: the selection is the matmul's epilogue, and no [b, n] array exists."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from saex.kernels.encode_topk import reference
from saex.kernels.topk import pallas_tpu_bins as bins
from saex.kernels.topk.pallas_tpu import by_blocks

TILE = 2**21  # entries of W_enc in a tile, at most


def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Tiles of pre-activations go from the matrix unit into bins; see ``pallas_tpu_bins``.

    A float32 matmul is one of full precision. Where the check of a row fails, and for k above 256,
    the batch is encoded by XLA, block of rows by block.
    """
    n = W_enc.shape[0]
    centred, weights = (x - b_pre[None]).astype(matmul_dtype), W_enc.astype(matmul_dtype)

    def in_blocks():
        return by_blocks(_slow(weights, b_enc, k, matmul_dtype), centred.astype(jnp.float32), n)

    if k > bins.MAX_K:
        return in_blocks()
    values, indices, exact = _binned(centred, weights, b_enc, k)
    if bins.always_exact(n, k):
        return values, indices
    return jax.lax.cond(exact, lambda: (values, indices), in_blocks)


def columns(d: int) -> int:
    """Latents of a tile, at most."""
    return max(bins.LANES, min(bins.COLUMNS, 1 << (TILE // d).bit_length() - 1))


def vmem_bytes(b: int, d: int, n: int, k: int, itemsize: int) -> int:
    """VMEM of the kernel: blocks of rows and of W_enc, each twice; the selection's."""
    rows, tile = bins.tile(b, n, k, columns(d))
    width = -(-d // bins.LANES) * bins.LANES
    need = 2 * (rows + tile) * width * itemsize + 2 * bins.SUBLANES * tile * 4
    return need + bins.vmem_bytes(b, n, k, columns(d))


def hbm_bytes(b: int, d: int, n: int, k: int, itemsize: int) -> int:
    """Bytes from and to HBM: W_enc and b_enc once for each block of rows, rows and codes once.

    W_enc comes b / 256 times, under a selection of some 40 vector operations a score.
    """
    rows, _ = bins.tile(b, n, k, columns(d))
    return -(-b // rows) * n * (d * itemsize + 4) + b * d * itemsize + 8 * b * k


def _binned(x, W, b_enc, k):
    (b, d), n = x.shape, W.shape[0]
    rows, tile = bins.tile(b, n, k, columns(d))
    specs = [
        pl.BlockSpec((rows, d), lambda i, j: (i, 0)),
        pl.BlockSpec((tile, d), lambda i, j: (j, 0)),
        pl.BlockSpec((1, tile), lambda i, j: (0, j)),
    ]
    need = vmem_bytes(b, d, n, k, x.dtype.itemsize) - bins.vmem_bytes(b, n, k, columns(d))
    return bins.select(
        *(_scores, [x, W, b_enc[None]], specs, jax.typeof(x), n, k, columns(d), need),
        moved=hbm_bytes(b, d, n, k, x.dtype.itemsize),
        flops=2 * b * d * n,
    )


def _scores(x, W, b_enc):
    exactly = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    p = jax.lax.dot_general(
        *(x[...], W[...], (((1,), (1,)), ((), ()))),
        precision=exactly,
        preferred_element_type=jnp.float32,
    )
    return p + b_enc[...]


def _slow(W, b_enc, k, matmul_dtype):
    zero = jnp.zeros((W.shape[1],), jnp.float32)

    def select(x):
        with jax.default_matmul_precision("highest" if matmul_dtype == "float32" else "default"):
            return reference.encode_topk(x, zero, W, b_enc, k, matmul_dtype)

    return select
