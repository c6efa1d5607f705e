"""An affine encoder and decoder on a support that was chosen before: sparse both ways.

Which latents are active is decided without gradients (``encode_topk`` and what follows it). On that
support the codes are differentiable functions of the encoder, and the reconstruction is one of the
codes and the decoder. The backward pass makes all of their gradients in one pass over the latents:

dz[b, j]  = (dvalues[b, j] + <dy[b], W_dec[i]>) where values[b, j] != 0,  i = indices[b, j]
dW_dec[i] = sum values[b, j] dy[b]
dW_enc[i] = sum dz[b, j] (x[b] - b_pre)
db_enc[i] = sum dz[b, j]

with sums over the slots that hold latent i. Nothing of shape [b, n] or [b, k, d] is made, and the
sums are taken in a fixed order: the same bits every time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import pick
from saex.kernels.sparse_affine import cpu, reference
from saex.kernels.sparse_decode import DOTS, sparse_decode

GRADS = {"reference": reference.grads, "cpu": cpu.grads}


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def sparse_affine(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    W_dec: Float[Array, "n o"],
    values: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    impl: str | None = None,
) -> tuple[Float[Array, "b k"], Float[Array, "b o"]]:
    """(values, sum_j values[b, j] W_dec[indices[b, j]]), with the gradients of the whole.

    Args:
      x: float32 rows; the encoder sees x - b_pre.
      values: the codes: <x - b_pre, W_enc[i]> + b_enc[i] of slots in use, 0 elsewhere. No gradient
        goes into them; it goes to the arrays that they were made of.
      indices: int32; a slot of value 0 adds nothing and gets no gradient, whatever its index.
      impl: a name from ``GRADS``, or None for the target's own.

    Raises:
      ValueError: an unknown ``impl``.
    """
    return values, sparse_decode(values, indices, W_dec)


def _forward(x, b_pre, W_enc, b_enc, W_dec, values, indices, impl):
    out = sparse_affine(x, b_pre, W_enc, b_enc, W_dec, values, indices, impl)
    return out, (x, b_pre, W_enc, W_dec, values, indices)


def _backward(impl, residuals, cotangents):
    x, b_pre, W_enc, W_dec, values, indices = residuals
    dvalues, g = cotangents
    dW_dec, dW_enc, db_enc = pick(GRADS, impl)(values, dvalues, indices, g, x - b_pre[None], W_dec)
    db_pre = -(db_enc @ W_enc)  # summed over rows first: a matrix-vector product
    # Once more, so that a backend need not hand it out; removed where nobody asks for dx.
    dz = jnp.where(values != 0, dvalues + pick(DOTS, None)(indices, g, W_dec), 0)
    dx = sparse_decode(dz, indices, W_enc)
    return dx, db_pre, dW_enc, db_enc, dW_dec, None, None


sparse_affine.defvjp(_forward, _backward)
