"""encode_topk a block of rows at a time: the scores stay in cache, and [b, n] is never held.

A fresh [b, n] costs more in page faults than the matmul that fills it: 70 ms against 62 at
(4096, 256, 2048), k = 32, on two cores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.encode_topk import reference
from saex.kernels.topk import cpu


def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The reference on blocks of ``cpu.block_rows`` rows.

    Latents that fill no group of the network are filled up with some at -inf: in the matrix, as
    to fill up the scores would hold a block of them twice.
    """
    n, b = len(W_enc), cpu.block_rows(len(x))
    spare = -n % cpu.GROUP
    spare = spare if cpu.by_network(b, n + spare, k) else 0
    W, bias = jnp.pad(W_enc, ((0, spare), (0, 0))), jnp.pad(b_enc, (0, spare))

    def select(scores, k):
        if spare:  # known only now: a row that is not finite makes NaN of weights of 0
            latent = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(latent < n, scores, -jnp.inf)
        return cpu.top_k(scores, k)

    def block(rows):
        return reference.encode_topk(rows, b_pre, W, bias, k, matmul_dtype, select)

    return cpu.in_blocks(block, x)
