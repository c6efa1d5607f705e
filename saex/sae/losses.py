"""Loss terms and the figures logged beside them, from one device's part of a batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex.kernels.encode_topk import pre_activations
from saex.kernels.topk import top_k
from saex.sae import ops
from saex.typing import Params


def mse(residual: Float[Array, "b d"]) -> Float[Array, ""]:
    """Mean over all rows of the mean square over d."""
    return ops.rows_mean(jnp.mean(jnp.square(residual), axis=1))


def variance(x: Float[Array, "b d"]) -> Float[Array, ""]:
    """Mean over all rows and d of the squared distance to the global batch's mean row."""
    mean = ops.rows_sum(jnp.sum(x, axis=0)) / ops.rows_count(x)
    return mse(x - mean[None])


def fvu(x: Float[Array, "b d"], residual: Float[Array, "b d"]) -> Float[Array, ""]:
    """Fraction of variance unexplained of this batch: sum ||r||^2 / sum ||x - mean||^2."""
    x, residual = jax.lax.stop_gradient((x, residual))
    return mse(residual) / jnp.maximum(variance(x), 1e-30)


def l1(values: Float[Array, "b n"], W_dec: Float[Array, "n d"]) -> Float[Array, ""]:
    """Mean over rows of sum_i |f_i| ||W_dec,i||; the gradient reaches the norms too."""
    square = jnp.sum(jnp.square(W_dec), axis=1)
    # sqrt has no gradient at 0: a row that is zero must not make every weight NaN
    norms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    weighted = jnp.abs(values) @ norms
    return ops.rows_mean(ops.latents_sum(weighted))


def aux_k(
    params: Params,
    x: Float[Array, "b d"],
    residual: Float[Array, "b d"],
    dead: Bool[Array, " n"],
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """AuxK (Gao et al. 2024, arXiv 2406.04093): dead latents model the residual.

    L = MSE(e_hat, e) / MSE(mean_b(e), e) with e the residual, held constant, and e_hat = f_aux
    W_dec (no bias), f_aux = relu of the k_aux largest pre-activations among dead latents. 0 where
    nothing is dead. Unlike the authors' code, which adds and subtracts b_dec on both sides (same
    value), no gradient reaches b_dec through the decoder. Pre-activations equal at the cut are
    all kept.

    Only dead latents are computed: their rows are gathered into a block of one of three sizes,
    so that the cost follows their number (that of the device with most of them) and every dead
    latent is in the block.

    Args:
      params: W_enc, W_dec, b_enc, b_dec: this device's latents.
      x: rows in scaled units.
      residual: x minus its reconstruction.
      dead: this device's dead latents.
      k_aux: dead latents that may serve one row.
      matmul_dtype: dtype of the matmuls' inputs.

    Returns:
      (loss, served): served counts latents that carried an auxiliary gradient in this batch.
    """
    n = dead.shape[0]
    e = jax.lax.stop_gradient(residual)
    count = jnp.sum(dead)
    most, total = ops.latents_max(count), ops.latents_sum(count)
    sizes = sorted({min(k_aux, n), min(max(n // 4, k_aux), n), n})
    fits = functools.reduce(lambda i, s: i + (most > s), sizes[:-1], jnp.int32(1))
    # the smallest block selects nothing, so all dead latents together must be within k_aux
    choice = jnp.where(total == 0, 0, jnp.where((total > k_aux) & (fits == 1), 2, fits))
    weights = {name: params[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    def none(weights, x, e):
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

    branches = [none]
    for i, size in enumerate(sizes if sizes[0] < n else [n, n]):
        select = i > 0 or sizes[0] > k_aux
        branch = functools.partial(
            _aux_block, dead=dead, size=size, k_aux=k_aux, select=select, dtype=matmul_dtype
        )
        # recomputed in the backward pass: a switch would else keep every branch's [b, size]
        branches.append(jax.checkpoint(branch))
    loss, served = jax.lax.switch(jnp.minimum(choice, len(branches) - 1), branches, weights, x, e)
    return loss, served


def _aux_block(weights, x, e, *, dead, size, k_aux, select, dtype):
    (block,) = jnp.nonzero(dead, size=size, fill_value=0)
    alive = jnp.arange(size) >= jnp.sum(dead)
    p = pre_activations(
        x, weights["b_dec"], weights["W_enc"][block], weights["b_enc"][block], dtype
    )
    f = jnp.where(alive[None], 0.0, jax.nn.relu(p))
    if select:
        f = jnp.where(f >= _cut(f, k_aux), f, 0.0)
    part = jnp.einsum(
        "bm,md->bd",
        f.astype(dtype),
        weights["W_dec"][block].astype(dtype),
        preferred_element_type=jnp.float32,
    )
    e_hat = ops.latents_sum(part)
    loss = mse(e_hat - e) / jnp.maximum(variance(e), 1e-30)
    served = ops.rows_sum(jnp.sum(f > 0, axis=0)) > 0
    return loss, ops.latents_sum(jnp.sum(served).astype(jnp.float32))


def _cut(f, k):
    """Each row's k-th largest entry over the devices' blocks, as a constant."""
    best, _ = top_k(jax.lax.stop_gradient(f), min(k, f.shape[1]))
    everyone = ops.latents_gather(best)
    best, _ = top_k(everyone, min(k, everyone.shape[1]))
    return best[:, -1:]
