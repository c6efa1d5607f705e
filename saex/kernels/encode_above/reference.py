"""The definition of encode_above: lines of one slot."""

import jax.numpy as jnp

from saex.kernels.encode_topk.reference import pre_activations


def encode_above(x, b_pre, W_enc, b_enc, least, room, matmul_dtype):
    """(values, indices, rows, whole) of all scores that are not at or below ``least``."""
    p = pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype)
    b = p.shape[0]
    above = ~(p <= least[None])
    rows, latents = jnp.nonzero(above, size=b * room, fill_value=(b, 0))
    values = p.at[rows, latents].get(mode="fill", fill_value=-jnp.inf)
    one = (a.astype(jnp.int32) for a in (latents[:, None], rows))
    return values[:, None], *one, jnp.sum(above, dtype=jnp.int32) <= b * room
