"""The affine encoder and decoder that most methods share, as functions of plain arrays.

Weights see rows in *scaled* units, x * scale: ``scale`` is a constant in params, estimated at
initialisation. ``encode`` takes and ``decode`` returns raw units, so a checkpoint is complete.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.sae.base import ArraySpec, SparseCodes
from saex.sae.ops import decode_part
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
    return decode_part(codes, params["W_dec"], matmul_dtype) + params["b_dec"][None]


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
