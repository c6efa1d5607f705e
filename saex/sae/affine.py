"""The affine encoder and decoder that most methods share, as functions of plain arrays.

Weights see rows in *scaled* units, x * scale: ``scale`` is a constant in params, estimated at
initialisation. ``encode`` takes and ``decode`` returns raw units, so a checkpoint is complete.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.sparse_affine import sparse_affine, sparse_affine_aux
from saex.kernels.sparse_affine.dead import largest, listed
from saex.kernels.topk import top_k
from saex.sae import ops
from saex.sae.base import ArraySpec, SparseCodes
from saex.typing import Params

Normalize = Literal["none", "unit_mean_square"]
BiasInit = Literal["geometric_median", "mean", "zeros"]


def specs(d_in: int, d_out: int, n: int) -> dict[str, ArraySpec]:
    """W_enc [n, d_in], W_dec [n, d_out], b_enc [n], b_dec [d_out], scale []."""
    return {
        "W_enc": ArraySpec((n, d_in), ("n", "d"), doc="encoder, one row per latent"),
        "W_dec": ArraySpec((n, d_out), ("n", "d"), doc="decoder, one row per latent"),
        "b_enc": ArraySpec((n,), ("n",), doc="encoder bias"),
        "b_dec": ArraySpec((d_out,), ("d",), doc="decoder bias"),
        "scale": ArraySpec((), (), trainable=False, doc="weights see x * scale"),
    }


def scaled(params: Params, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Raw rows of any float dtype in the units that the weights see, float32."""
    return x.astype(jnp.float32) * params["scale"]


def decode(params: Params, codes, matmul_dtype: str = "float32") -> Float[Array, "b d"]:
    """codes W_dec + b_dec, in scaled units, from one device's part of the latents."""
    return ops.decode_part(codes, params["W_dec"], matmul_dtype) + params["b_dec"][None]


def decode_chosen(
    params: Any, x: Float[Array, "b d"], codes: SparseCodes
) -> tuple[SparseCodes, Float[Array, "b o"]]:
    """(codes, reconstruction without bias), as functions of the affine encoder and decoder.

    Args:
      params: W_enc, b_enc, W_dec, b_dec (taken from x before the encoder): this device's latents.
      x: rows in scaled units.
      codes: pre-activations where a latent was chosen, 0 elsewhere; no gradient of their own.

    Returns:
      The codes with the gradient that leads to the encoder, and the sum over all devices' latents.
    """
    weights = (x, *(params[name] for name in ("b_dec", "W_enc", "b_enc", "W_dec")))
    codes = jax.lax.stop_gradient(codes)
    out: tuple = sparse_affine(*ops.own(weights), codes.values, codes.indices)
    values, y = out
    return SparseCodes(values, codes.indices), ops.latents_sum(y)


def decode_chosen_aux(
    params: Any,
    x: Float[Array, "b d"],
    codes: SparseCodes,
    dead: Bool[Array, " n"],
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[SparseCodes, Float[Array, "b o"], Float[Array, "b o"], Float[Array, ""]]:
    """``decode_chosen``, and the reconstruction (without bias) by the dead latents alone.

    Args:
      params, x, codes: as ``decode_chosen``; no gradient reaches x.
      dead: this device's dead latents.
      k_aux: how many of all dead latents may serve one row: the largest pre-activations above 0.
        Those equal at the cut are all kept.
      matmul_dtype: dtype of the dense products' inputs.

    Returns:
      (codes, y, y_dead, served): served counts latents that any row of the batch used.
    """
    weights = (x, *(params[name] for name in ("b_dec", "W_enc", "b_enc", "W_dec")))
    codes, held, rows = jax.lax.stop_gradient((codes, params, x))
    cut = _dead_cut(held, rows, dead, k_aux, matmul_dtype)
    args = ops.own((*weights, codes.values, codes.indices, listed(dead), cut))
    out: tuple = sparse_affine_aux(*args, matmul_dtype)
    values, y, y_dead, active = out
    served = ops.latents_sum(jnp.sum(ops.rows_sum(active) > 0, dtype=jnp.float32))
    return SparseCodes(values, codes.indices), ops.latents_sum(y), ops.latents_sum(y_dead), served


def _dead_cut(params, x, dead, k_aux, matmul_dtype):
    """[b, 1]: each row's k_aux-th largest pre-activation over all devices' dead latents, or 0."""
    weights = ops.own((x - params["b_dec"][None], params["W_enc"], params["b_enc"]))
    k = min(k_aux, dead.shape[0])

    def search(weights):
        x, W_enc, b_enc = weights
        best = largest(x, W_enc, b_enc, ops.own(listed(dead)), k, matmul_dtype)
        everyone = ops.latents_gather(best)
        best, _ = top_k(everyone, min(k_aux, everyone.shape[1]))
        return best[:, -1:]

    def nothing(args):
        return zeros_as((x.shape[0], 1), args[0])

    return jax.lax.cond(ops.latents_sum(jnp.sum(dead)) > k_aux, search, nothing, weights)


def scale_of(x: Float[Array, "b d"], how: Normalize) -> Float[Array, ""]:
    """The constant c with mean ||c x||^2 = 1 over the sample, or 1."""
    if how == "none":
        return jnp.ones(())
    return jax.lax.rsqrt(jnp.mean(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))


def centre(x: Float[Array, "b d"], how: BiasInit) -> Float[Array, " d"]:
    """Where b_dec starts: the sample's geometric median (Weiszfeld, 100 steps), mean, or 0."""
    if how == "zeros":
        return jnp.zeros((x.shape[1],))
    mean = jnp.mean(x, axis=0)
    if how == "mean":
        return mean

    def weiszfeld(_, m):
        weight = 1 / jnp.maximum(jnp.linalg.norm(x - m[None], axis=1), 1e-6)
        return weight @ x / jnp.sum(weight)

    return jax.lax.fori_loop(0, 100, weiszfeld, mean)


def unit_rows(W: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows scaled to norm 1."""
    return W / jnp.maximum(jnp.linalg.norm(W, axis=1, keepdims=True), 1e-12)


def tangent(W: Float[Array, "n d"], g: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """g without each row's part along the (unit) row of W."""
    return g - jnp.sum(g * W, axis=1, keepdims=True) * W


def tied_init(key: jax.Array, d: int, n: int) -> Float[Array, "n d"]:
    """Uniform(-1/sqrt(d), 1/sqrt(d)) rows: the encoder, whose unit rows the decoder starts from."""
    bound = d**-0.5
    return jax.random.uniform(key, (n, d), jnp.float32, -bound, bound)


LONGEST_COUNT = 2**30  # rows; counters stop here, since an int32 turns negative at 2^31


def since_fired(before: Int[Array, " n"], fired: Bool[Array, " n"], rows: int) -> Int[Array, " n"]:
    """Rows since each latent last fired, after ``rows`` more; saturates beyond 2^30."""
    return jnp.where(fired, 0, jnp.minimum(before, LONGEST_COUNT) + rows).astype(jnp.int32)


def check_dead_after(tokens: int) -> None:
    """Raise ValueError where ``since_fired`` could never say that a latent is dead."""
    if not 1 <= tokens <= LONGEST_COUNT:
        raise ValueError(f"dead_after_tokens={tokens}: must be in 1..{LONGEST_COUNT} (2^30)")


def used_slots(values: Float[Array, "b k"], indices) -> SparseCodes:
    """Codes in canonical form: index 0 where the value is 0."""
    return SparseCodes(values, jnp.where(values != 0, indices, 0))
