"""The backward pass on Hopper: one warpgroup a latent, all three sums in registers.

Per slot: a row of g and one of x are read, <g, W_dec[i]> gives dz, and the sums of dW_dec, dW_enc
and db_enc take their terms. W_dec is read once, gradients are written once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import csc
from saex.kernels.mosaic_gpu import pad
from saex.kernels.sparse_decode.pallas_gpu import PIECE, over_latents


def grads(
    values: Float[Array, "b k"],
    dvalues: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b o"],
    x: Float[Array, "b d"],
    W_dec: Float[Array, "n o"],
    piece: int = PIECE,
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """(dW_dec, dW_enc, db_enc) in float32; the same bits every time."""

    def add(sums, scalars, rows, latent):
        (dec, enc, bias), (v, dv), (g, x) = sums, scalars, rows
        dz = dv + jnp.sum(g * latent[0])
        return dec + v * g, enc + dz * x, bias + dz

    (n, o), d = W_dec.shape, x.shape[1]
    g, x, W_dec = pad(g), pad(x), pad(W_dec)
    slots = csc.sort_slots(values != 0, indices, n)
    widths = (g.shape[1], x.shape[1], None)
    dec, enc, bias = over_latents(add, slots, (values, dvalues), (g, x), (W_dec,), widths, piece)
    return dec[:, :o], enc[:, :d], bias
