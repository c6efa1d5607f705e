"""encode_topk for XLA on GPU: a matmul, one pass for the group maxima, and the second level.

The bias is added where scores are read (to the maxima's operand and to the candidates), so that the
matmul's output is the only array of the size of [b, n]; rows are taken in blocks where even that
one would be larger than ``BYTES``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.topk import xla_gpu as topk
from saex.kernels.topk.order import group_maxima

BYTES = 2**31  # of the scores that are held at a time


def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Blocks of rows, the largest that divide b and fit ``BYTES``."""
    (b, d), n = x.shape, W_enc.shape[0]
    W = W_enc.astype(matmul_dtype)

    def block(rows):
        inputs = (rows - b_pre[None]).astype(matmul_dtype)
        p = jnp.einsum("bd,nd->bn", inputs, W, preferred_element_type=jnp.float32)
        return _select(jax.lax.optimization_barrier(p), b_enc, k)

    rows = block_rows(b, n)
    if rows == b:
        return block(x)
    values, indices = jax.lax.map(block, x.reshape(b // rows, rows, d))
    return values.reshape(b, k), indices.reshape(b, k)


def block_rows(b: int, n: int) -> int:
    """Rows of a block: the largest divisor of b whose float32 scores fit ``BYTES``."""
    fitting = max(BYTES // (4 * n), 1)
    return next(rows for rows in range(min(b, fitting), 0, -1) if b % rows == 0)


def _select(p, b_enc, k):
    n = p.shape[1]
    g = topk.group_of(n, k)
    if g == 1 or n % g:
        return topk.top_k(p + b_enc[None], k)
    return topk.finish(p, group_maxima(p + b_enc[None], g), k, g, bias=b_enc)
