"""Encoder and selection in one op whose backward pass never does the dense work."""

import functools

import jax
from jaxtyping import Array, Float, Int

from saex.kernels import late, pick
from saex.kernels.encode_topk import cpu, reference, xla_gpu
from saex.kernels.encode_topk.reference import pre_activations as pre_activations
from saex.kernels.sparse_decode import (
    decode_lines,
    scatter_lines,
    sparse_decode,
    sparse_scatter,
    sparse_sum,
)

IMPLS = {
    "reference": reference.encode_topk,
    "cpu": cpu.encode_topk,
    "gpu": xla_gpu.encode_topk,
    # Opt in by name until a GPU has measured it against "gpu".
    "pallas_gpu": late("saex.kernels.encode_topk.pallas_gpu", "encode_topk"),
    "pallas_tpu": late("saex.kernels.encode_topk.pallas_tpu", "encode_topk"),
    # For memory: XLA holds [b, n] and as much again inside its TopK, the kernel neither; not timed.
    "tpu": late("saex.kernels.encode_topk.pallas_tpu", "encode_topk"),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
    impl: str | None = None,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The k largest pre-activations of each row, largest first, and their latents (int32).

    p = (x - b_pre) W_enc^T + b_enc; the values are those of p, before any ReLU. The gradient
    reaches only the chosen latents' rows, exactly as through ``top_k(p, k)``, in sums of a fixed
    order (where x is not finite it may reach others, as NaN).

    What is not finite is ordered as in ``top_k``: NaN first, which is what a row x with NaN has for
    all latents, and a row with infinity for all whose weight there is 0 or has a partner of the
    other sign. Indices are in 0..n-1 and different in any case. ("pallas_gpu" differs: see there.)
    Where [b, n] is large it is made in blocks of rows, or on TPU not at all, without being told.

    Args:
      x: float32 rows.
      k: at most n.
      matmul_dtype: dtype of the matmul's inputs; it accumulates, and selects, in float32.
      impl: a name from ``IMPLS``, or None for the target's own; the gradient's ops are those of the
        same name.

    Raises:
      ValueError: ``k`` outside of 1..n, or an unknown ``impl``.
    """
    n = W_enc.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} latents: k must be between 1 and n")
    return pick(IMPLS, impl)(x, b_pre, W_enc, b_enc, k, matmul_dtype)


def _forward(x, b_pre, W_enc, b_enc, k, matmul_dtype, impl):
    chosen: tuple = encode_topk(x, b_pre, W_enc, b_enc, k, matmul_dtype, impl)
    return chosen, (x, b_pre, W_enc, chosen[1])


def _backward(k, matmul_dtype, impl, residuals, cotangents):
    x, b_pre, W_enc, indices = residuals
    dvalues = cotangents[0]
    n = W_enc.shape[0]
    db_enc = sparse_sum(dvalues, indices, n, impl)
    dW_enc = sparse_scatter(dvalues, indices, x - b_pre[None], n, impl)
    db_pre = -(db_enc @ W_enc)  # summed over rows first: a matrix-vector product
    dx = sparse_decode(dvalues, indices, W_enc, impl)  # removed by the compiler if nobody asks
    return dx, db_pre, dW_enc, db_enc


encode_topk.defvjp(_forward, _backward)


@jax.custom_vjp
def chosen_scores(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    values: Float[Array, "v s"],
    indices: Int[Array, "v s"],
    owner: Int[Array, " v"],
) -> Float[Array, "v s"]:
    """``values`` again, as the function of the encoder that they are.

    For pre-activations at ``indices`` that were found without a gradient: what comes back to a
    slot goes on to its latent's row, as through ``encode_topk``.

    Args:
      owner: whose row of x each line is, b for nobody's.
    """
    return values


def _chosen_forward(x, b_pre, W_enc, b_enc, values, indices, owner):
    return values, (x, b_pre, W_enc, indices, owner)


def _chosen_backward(residuals, g):
    x, b_pre, W_enc, indices, owner = residuals
    n = W_enc.shape[0]
    db_enc = sparse_sum(g, indices, n)
    dW_enc = scatter_lines(g, indices, x - b_pre[None], owner, n)
    db_pre = -(db_enc @ W_enc)
    dx = decode_lines(g, indices, W_enc, owner, x.shape[0])
    return dx, db_pre, dW_enc, db_enc, None, None, None


chosen_scores.defvjp(_chosen_forward, _chosen_backward)
