"""The dead latents' part of an affine dictionary: dense products, a block of latents at a time.

A loop over blocks costs nothing where nothing is dead, takes any number of dead latents, holds no
[b, n], and its gradients are added into those of the living in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as

BLOCK = 1024  # latents of a block


class Dead(NamedTuple):
    """order: int32 [blocks * size], the dead latents' numbers first. count: int32, how many."""

    order: Int[Array, " m"]
    count: Int[Array, ""]


def listed(dead: Bool[Array, " n"]) -> Dead:
    """The dead latents, in rising order, filled up to whole blocks."""
    n = dead.shape[0]
    size = min(BLOCK, n)
    (order,) = jnp.nonzero(dead, size=-(-n // size) * size, fill_value=0)
    return Dead(order.astype(jnp.int32), jnp.sum(dead, dtype=jnp.int32))


def largest(
    x: Float[Array, "b d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    dead: Dead,
    k: int,
    dtype: str,
) -> Float[Array, "b k"]:
    """Each row's k largest pre-activations among the dead, largest first, and 0 below 0."""

    def step(i, best):
        _, f = _block(i, x, W_enc, b_enc, dead, dtype)
        return jax.lax.top_k(jnp.concatenate([best, f], axis=1), k)[0]

    return _loop(dead, step, zeros_as((x.shape[0], k), x))


def decode(
    x: Float[Array, "b d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    W_dec: Float[Array, "n o"],
    dead: Dead,
    cut: Float[Array, "b 1"],
    dtype: str,
) -> tuple[Float[Array, "b o"], Int[Array, " n"]]:
    """(f W_dec over dead latents, in how many rows each latent's f is above 0).

    f = relu(x W_enc^T + b_enc) where that is at least ``cut``.
    """

    def step(i, carry):
        y, active = carry
        latents, f = _block(i, x, W_enc, b_enc, dead, dtype)
        f = jnp.where(f >= cut, f, 0)
        y = y + _dot("bm,md->bd", f, W_dec[latents], dtype)
        return y, active.at[latents].add(jnp.sum(f > 0, axis=0, dtype=jnp.int32))

    y = zeros_as((x.shape[0], W_dec.shape[1]), x)
    return _loop(dead, step, (y, zeros_as(b_enc.shape, x, jnp.int32)))


def add_grads(
    grads: tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]],
    x: Float[Array, "b d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    W_dec: Float[Array, "n o"],
    dead: Dead,
    cut: Float[Array, "b 1"],
    g: Float[Array, "b o"],
    dtype: str,
) -> tuple[Float[Array, "n o"], Float[Array, "n d"], Float[Array, " n"]]:
    """(dW_dec, dW_enc, db_enc) with ``decode``'s added, given the gradient g of its first result.

    The cut is a constant: no gradient goes through the choice.
    """

    def step(i, carry):
        dW_dec, dW_enc, db_enc = carry
        latents, f = _block(i, x, W_enc, b_enc, dead, dtype)
        f = jnp.where(f >= cut, f, 0)
        dz = jnp.where(f > 0, _dot("bd,md->bm", g, W_dec[latents], dtype), 0)
        return (
            dW_dec.at[latents].add(_dot("bm,bd->md", f, g, dtype)),
            dW_enc.at[latents].add(_dot("bm,bd->md", dz, x, dtype)),
            db_enc.at[latents].add(jnp.sum(dz, axis=0)),
        )

    return _loop(dead, step, grads)


def _block(i, x, W_enc, b_enc, dead, dtype):
    """(numbers of the block's latents, relu of their pre-activations; 0 beyond the last one)."""
    size = min(BLOCK, W_enc.shape[0])
    latents = jax.lax.dynamic_slice_in_dim(dead.order, i * size, size)
    p = _dot("bd,md->bm", x, W_enc[latents], dtype) + b_enc[latents][None]
    real = i * size + jnp.arange(size) < dead.count
    return latents, jnp.where(real[None], jax.nn.relu(p), 0)


def _loop(dead, step, start):
    size = min(BLOCK, dead.order.shape[0])
    return jax.lax.fori_loop(0, (dead.count + size - 1) // size, step, start)


def _dot(formula, a, b, dtype):
    return jnp.einsum(formula, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
