"""The dead latents' part of an affine dictionary: dense products, a block of latents at a time.

A loop over blocks costs nothing where nothing is dead, takes any number of dead latents, holds no
[b, n], and its gradients are added into those of the living in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import pick, target, zeros_as

# Latents of a block, by target. Most steps have no dead latent or a few, and a block costs the same
# with one as when it is full. At (4096, 512, 8192) on two cores one of 128 takes 20 ms and one of
# 1024 takes 156; 1000 dead latents take 145 and 157. On devices neither is measured.
BLOCKS = {"cpu": 128, "gpu": 1024, "tpu": 1024}
ROWS = 256  # of which ``by_bisection`` holds all dead latents: 3000 of them are 3 MB


class Dead(NamedTuple):
    """order: int32 [blocks * size], the dead latents' numbers first. count: int32, how many."""

    order: Int[Array, " m"]
    count: Int[Array, ""]


def block(n: int, of: str | None = None) -> int:
    """Latents of a block, of n; ``of``: a target, else the one that is compiled for."""
    return min(BLOCKS.get(of or target(), 1024), n)


def listed(dead: Bool[Array, " n"]) -> Dead:
    """The dead latents, in rising order, filled up to whole blocks."""
    n = dead.shape[0]
    size = block(n)
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


def cut(
    x: Float[Array, "b d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    dead: Dead,
    k: int,
    dtype: str,
    impl: str | None = None,
) -> Float[Array, "b 1"]:
    """Each row's k-th largest pre-activation among the dead, or 0 where fewer are above 0.

    Args:
      x: rows less b_pre. k: at most n. dtype: of the matmul's inputs.
      impl: a name from ``CUTS``, or None for the target's own.

    Raises:
      ValueError: an unknown ``impl``.
    """
    return pick(CUTS, impl)(x, W_enc, b_enc, dead, k, dtype)


def by_selection(x, W_enc, b_enc, dead, k, dtype):
    """The last of the k largest."""
    return largest(x, W_enc, b_enc, dead, k, dtype)[:, -1:]


def by_bisection(x, W_enc, b_enc, dead, k, dtype):
    """By counting, a block of rows at a time; nothing is sorted.

    XLA on CPU sums over d alike for any number of rows above one, so that these pre-activations
    have the bits of those in ``decode``, which takes all rows at once.
    """
    b, d = x.shape
    rows = -(-b // -(-b // ROWS))  # blocks of one size, but for less than a row of each

    def of_rows(rows):
        bits = _bits(rows, W_enc, b_enc, dead, dtype)
        return jax.lax.bitcast_convert_type(_kth(bits, dead, k), jnp.float32)

    blocks = jnp.pad(x, ((0, -b % rows), (0, 0))).reshape(-1, rows, d)
    return jax.lax.map(of_rows, blocks).reshape(-1, 1)[:b]


CUTS = {"reference": by_selection, "cpu": by_bisection}


def _bits(x, W_enc, b_enc, dead, dtype):
    """int32 [blocks, b, size]: relu of pre-activations as integers, which order like them."""
    size = block(W_enc.shape[0])

    def step(i, bits):
        _, f = _block(i, x, W_enc, b_enc, dead, dtype)
        f = jax.lax.bitcast_convert_type(f, jnp.int32)[None]
        return jax.lax.dynamic_update_slice_in_dim(bits, f, i, axis=0)

    shape = dead.order.shape[0] // size, x.shape[0], size
    return _loop(dead, step, zeros_as(shape, x, jnp.int32))


def _kth(bits, dead, k):
    """int32 [b]: the largest number that at least k of a row's are as large as, or 0."""
    zero = zeros_as((bits.shape[1],), bits)

    def halve(_, bounds):
        low, high = bounds  # at least k are >= low (or it is 0), fewer are >= high
        middle = low + (high - low) // 2
        count = _loop(dead, lambda i, c: c + jnp.sum(bits[i] >= middle[:, None], axis=1), zero)
        enough = count >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    beyond = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32) + 1
    return jax.lax.fori_loop(0, 31, halve, (zero, zero + beyond))[0]


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
    size = block(W_enc.shape[0])
    latents = jax.lax.dynamic_slice_in_dim(dead.order, i * size, size)
    p = _dot("bd,md->bm", x, W_enc[latents], dtype) + b_enc[latents][None]
    real = i * size + jnp.arange(size) < dead.count
    return latents, jnp.where(real[None], jax.nn.relu(p), 0)


def _loop(dead, step, start):
    size = block(dead.order.shape[0])
    return jax.lax.fori_loop(0, (dead.count + size - 1) // size, step, start)


def _dot(formula, a, b, dtype):
    return jnp.einsum(formula, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)
