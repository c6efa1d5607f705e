"""The definition of encode_topk."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.topk import reference


def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
    select: Callable = reference.top_k,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Top k of the pre-activations; ``select`` is that of a backend of ``topk``."""
    return select(pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype), k)


def pre_activations(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    matmul_dtype: str = "float32",
) -> Float[Array, "b n"]:
    """(x - b_pre) W_enc^T + b_enc in float32, with matmul inputs of ``matmul_dtype``."""
    p = jnp.einsum(
        "bd,nd->bn",
        (x - b_pre[None]).astype(matmul_dtype),
        W_enc.astype(matmul_dtype),
        preferred_element_type=jnp.float32,
    )
    return p + b_enc[None]
