"""An affine encoder and decoder on a support that was chosen before: sparse both ways.

Which latents are active is decided without gradients (``encode_topk`` and what follows it). On that
support the codes are differentiable functions of the encoder, and the reconstruction is one of the
codes and the decoder. The backward pass makes all of their gradients in one pass over the latents:

dz[b, j]  = (dvalues[b, j] + <dy[b], W_dec[i]>) where values[b, j] != 0,  i = indices[b, j]
dW_dec[i] = sum values[b, j] dy[b]
dW_enc[i] = sum dz[b, j] (x[b] - b_pre)
db_enc[i] = sum dz[b, j]

with sums over the slots that hold latent i. Nothing of shape [b, k, d] is made, and [b, n] only of
blocks of rows where latents are few (``sparse_decode.cpu.NARROW``); the sums are taken in a fixed
order: the same bits every time.

Where rows have different numbers of latents, codes come in lines, as many of a row as it needs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import late, pick
from saex.kernels.sparse_affine import cpu, reference, xla_gpu
from saex.kernels.sparse_affine.dead import Dead, add_grads
from saex.kernels.sparse_affine.dead import decode as decode_dead
from saex.kernels.sparse_decode import (
    DOTS,
    by_blocks,
    decode_lines,
    dots_lines,
    sparse_decode,
    take_lines,
)

GRADS = {
    "reference": reference.grads,
    "cpu": cpu.grads,
    "gpu": xla_gpu.grads,
    # Opt in by name until a GPU has measured it against "gpu".
    "pallas_gpu": late("saex.kernels.sparse_affine.pallas_gpu", "grads"),
    "pallas_tpu": late("saex.kernels.sparse_affine.pallas_tpu", "grads"),
    # For memory, as in sparse_decode; not timed.
    "tpu": late("saex.kernels.sparse_affine.pallas_tpu", "grads"),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 9))
def sparse_affine(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    W_dec: Float[Array, "n o"],
    values: Float[Array, "v k"],
    indices: Int[Array, "v k"],
    impl: str | None = None,
    owner: Int[Array, " v"] | None = None,
    levels: int = 1,
) -> tuple[Float[Array, "v k"], Float[Array, "m o"]]:
    """(values, sum_j values[b, j] W_dec[indices[b, j]]), with the gradients of the whole.

    Args:
      x: float32 rows; the encoder sees x - b_pre.
      values: the codes: <x - b_pre, W_enc[i]> + b_enc[i] of slots in use, 0 elsewhere. No gradient
        goes into them; it goes to the arrays that they were made of.
      indices: int32; a slot of value 0 adds nothing and gets no gradient, whatever its index, as
        long as all is finite: see ``sparse_decode`` for what is not.
      impl: a name from ``GRADS``, or None for the target's own; products with the dictionary are
        those of the same name.
      owner: int32, whose row of x each line of values is, b for nobody's; None: each its own.
      levels: reconstructions of each row of x: y is [b * levels, o], and ``owner`` tells its rows.

    Raises:
      ValueError: an unknown ``impl``.
    """
    return values, _decode(values, indices, W_dec, owner, x.shape[0] * levels, impl)


def _decode(values, indices, W, owner, b, impl):
    if owner is None:
        return sparse_decode(values, indices, W, impl)
    return decode_lines(values, indices, W, owner, b, impl)


def _grads(values, dvalues, indices, g, x, W_dec, owner, impl, levels=1):
    if owner is None:
        return pick(GRADS, impl)(values, dvalues, indices, g, x, W_dec)
    if by_blocks(impl):
        return cpu.grads_lines(values, dvalues, indices, g, x, W_dec, owner, levels)
    g, x = take_lines(g, owner), take_lines(x, owner // levels)
    return pick(GRADS, impl)(values, dvalues, indices, g, x, W_dec)


def _forward(x, b_pre, W_enc, b_enc, W_dec, values, indices, impl, owner, levels):
    out = sparse_affine(x, b_pre, W_enc, b_enc, W_dec, values, indices, impl, owner, levels)
    return out, (x, b_pre, W_enc, W_dec, values, indices, owner)


def _backward(impl, levels, residuals, cotangents):
    x, b_pre, W_enc, W_dec, values, indices, owner = residuals
    dvalues, g = cotangents
    args = values, dvalues, indices, g, x - b_pre[None], W_dec, owner
    dW_dec, dW_enc, db_enc = _grads(*args, impl, levels)
    db_pre = -(db_enc @ W_enc)  # summed over rows first: a matrix-vector product
    # Once more, so that a backend need not hand it out; removed where nobody asks for dx.
    if owner is None:
        dz = pick(DOTS, impl)(indices, g, W_dec)
    else:
        dz = dots_lines(indices, g, W_dec, owner, impl)
    dz = jnp.where(values != 0, dvalues + dz, 0)
    whose = None if owner is None else owner // levels
    dx = _decode(dz, indices, W_enc, whose, x.shape[0], impl)
    return dx, db_pre, dW_enc, db_enc, dW_dec, None, None, None


sparse_affine.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def sparse_affine_aux(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    W_dec: Float[Array, "n o"],
    values: Float[Array, "v k"],
    indices: Int[Array, "v k"],
    dead: Dead,
    cut: Float[Array, "b 1"],
    matmul_dtype: str = "float32",
    impl: str | None = None,
    owner: Int[Array, " v"] | None = None,
) -> tuple[Float[Array, "v k"], Float[Array, "b o"], Float[Array, "b o"], Int[Array, " n"]]:
    """``sparse_affine`` and, beside it, what the dead latents make of the same rows (AuxK).

    One op, so that the gradients of the dead are added into those of the living in place, and cost
    nothing where nothing is dead.

    Args:
      x: rows, held constant: no gradient reaches them.
      b_pre to indices, owner: as ``sparse_affine``.
      dead: ``dead.listed`` of this device's dead latents.
      cut: the smallest pre-activation with which a dead latent takes part, at least 0, a constant.
      matmul_dtype: of the dead latents' dense products.
      impl: as ``sparse_affine``; the dead latents' products are XLA's on all.

    Returns:
      (values, y, y_dead, active): y_dead = f W_dec with f = relu(pre-activation) of dead latents at
      or above the cut; active: in how many rows each latent had f > 0.
    """
    y_dead, active = decode_dead(x - b_pre[None], W_enc, b_enc, W_dec, dead, cut, matmul_dtype)
    return values, _decode(values, indices, W_dec, owner, x.shape[0], impl), y_dead, active


def _aux_forward(x, b_pre, W_enc, b_enc, W_dec, values, indices, dead, cut, dtype, impl, owner):
    args = (x, b_pre, W_enc, b_enc, W_dec, values, indices, dead, cut)
    return sparse_affine_aux(*args, dtype, impl, owner), (*args, owner)


def _aux_backward(matmul_dtype, impl, residuals, cotangents):
    x, b_pre, W_enc, b_enc, W_dec, values, indices, dead, cut, owner = residuals
    dvalues, g, g_dead, _ = cotangents
    x = x - b_pre[None]
    grads = _grads(values, dvalues, indices, g, x, W_dec, owner, impl)
    dW_dec, dW_enc, db_enc = add_grads(
        grads, x, W_enc, b_enc, W_dec, dead, cut, g_dead, matmul_dtype
    )
    return None, -(db_enc @ W_enc), dW_enc, db_enc, dW_dec, None, None, None, None, None


sparse_affine_aux.defvjp(_aux_forward, _aux_backward)
