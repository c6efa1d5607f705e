"""The backward pass on TPU: one pass over tiles of latents, see ``sparse_decode``'s."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels.sparse_decode.pallas_tpu_latents import (
    CHUNK,
    LANES,
    SUBLANES,
    dot,
    over_tiles,
    pad,
    plan,
    rows_out,
    scalars_out,
)
from saex.kernels.sparse_decode.pallas_tpu_latents import (
    vmem_bytes as latents_vmem,
)


def grads(
    values: Float[Array, "b k"],
    dvalues: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b o"],
    x: Float[Array, "b d"],
    W_dec: Float[Array, "n o"],
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """(dW_dec, dW_enc, db_enc) in float32; the same bits every time.

    Rows of g and x are fetched together, once per slot in use; gradients are written once. A row
    that is not finite makes all latents of the tiles that it touches NaN.
    """
    (n, o), d = W_dec.shape, x.shape[1]
    work = plan(indices, values != 0, (values, dvalues), n)
    batch = jnp.concatenate([pad(g, 1, LANES), pad(x, 1, LANES)], axis=1)
    W_dec = pad(W_dec, 1, LANES)
    width = W_dec.shape[1]
    out = [rows_out(n, width), rows_out(n, batch.shape[1] - width), scalars_out(n)]
    dW_dec, dW_enc, db_enc = over_tiles(_item, work, batch, [W_dec], out)
    return dW_dec[:, :o], dW_enc[:, :d], db_enc[::SUBLANES].reshape(-1)[:n]


def _item(here, factors, fetched, tiles, add):
    values, dvalues = (f[0] for f in factors)
    (W_dec,) = tiles
    o = W_dec.shape[1]
    g, x = fetched[:, :o], fetched[:, o:]
    add(0, dot(jnp.where(here, values, 0), g))
    # <g, W_dec> of every slot with every latent of the tile; those that belong together are kept.
    dz = jnp.where(here, dot(W_dec[...], g, transposed=True) + dvalues, 0)
    add(1, dot(dz, x))
    # The sum over the chunk's slots, as a product: it comes out with a latent in each lane.
    add(2, dot(jnp.ones((SUBLANES, CHUNK), jnp.float32), dz, transposed=True))


def vmem_bytes(o: int, d: int) -> int:
    """VMEM of ``grads``: rows of g and x, a tile of W_dec, and tiles of the three gradients."""
    o, d = (-(-width // LANES) * LANES for width in (o, d))
    return latents_vmem(o + d, 2 * o + d + SUBLANES)
