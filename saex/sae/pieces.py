"""What codes say of a batch, piece by piece: reconstructions, sums over latents, who fired."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels.sparse_decode import sparse_decode, sparse_take
from saex.sae import ops
from saex.sae.base import DenseCodes, LossCodes, MixedCodes, SparseCodes


def decode_part(codes: LossCodes, W_dec: Float[Array, "n d"], matmul_dtype: str = "float32") -> Any:
    """The reconstruction (without bias) of all devices' codes, float32 [b, d]."""
    if isinstance(codes, DenseCodes):
        return ops.latents_sum(decode_dense(codes, W_dec, matmul_dtype))
    narrow = codes.pieces[0]
    y = sparse_decode(*ops.own((narrow.values, narrow.indices, W_dec)))
    return ops.latents_sum(y + decode_wide(codes, W_dec, matmul_dtype))


def decode_wide(codes: SparseCodes | MixedCodes, W_dec: Any, matmul_dtype: str) -> Any:
    """What this device's dense piece adds to the reconstruction [b, d]; 0 where there is none."""
    if isinstance(codes, SparseCodes):
        return 0.0
    return spread(decode_dense(codes.wide, W_dec, matmul_dtype), codes)


def decode_dense(codes: DenseCodes, W_dec: Any, matmul_dtype: str) -> Any:
    """The product of this device's dense codes and latents, float32 [b, d]."""
    return jnp.einsum(
        "bn,nd->bd",
        codes.values.astype(matmul_dtype),
        W_dec.astype(matmul_dtype),
        preferred_element_type=jnp.float32,
    )


def spread(part: Any, codes: MixedCodes) -> Any:
    """What belongs to the rows of ``codes.wide`` [m, ...] at rows of the batch [b, ...]; else 0."""
    return _spread(part, codes.rows, codes.places)


@jax.custom_vjp
def _spread(part, rows, places):
    return part.at[places].get(mode="fill", fill_value=0)


def _spread_forward(part, rows, places):
    return _spread(part, rows, places), rows


def _spread_backward(rows, g):
    # each row has one place: no scatter, which would add floats in any order on a GPU
    return g.at[rows].get(mode="fill", fill_value=0), None, None


_spread.defvjp(_spread_forward, _spread_backward)


def row_sums(codes: LossCodes, of: Callable) -> Any:
    """For each row the sum of ``of(piece)`` [rows, slots] over this device's latents, [b]."""
    return _whole(codes, [jnp.sum(of(piece), axis=1) for piece in codes.pieces])


def weighed(codes: LossCodes, vector: Float[Array, " n"]) -> Float[Array, " b"]:
    """For each row the sum of codes times a number of each of this device's latents."""

    def sums(piece):
        if isinstance(piece, DenseCodes):
            return piece.values @ vector
        return jnp.sum(piece.values * of_latents(vector, piece), axis=1)

    return _whole(codes, [sums(piece) for piece in codes.pieces])


def _whole(codes: LossCodes, sums: list) -> Any:
    return sums[0] + spread(sums[1], codes) if isinstance(codes, MixedCodes) else sums[0]


def of_latents(vector: Float[Array, " n"], piece: Any) -> Float[Array, "r c"]:
    """A number of each of this device's latents, shaped to meet the values of a piece of codes."""
    if isinstance(piece, DenseCodes):
        return vector[None]
    return sparse_take(ops.own(vector), piece.indices)


def firings(codes: LossCodes, n_local: int) -> Int[Array, " n"]:
    """In how many rows of the global batch each of this device's latents is not 0."""

    def counts(piece):
        on = jax.lax.stop_gradient(piece.values) != 0
        if isinstance(piece, DenseCodes):
            return jnp.sum(on, axis=0, dtype=jnp.int32)
        ones = on.reshape(-1).astype(jnp.int32)
        return jnp.zeros((n_local,), jnp.int32).at[piece.indices.reshape(-1)].add(ones)

    return ops.rows_sum(sum(counts(piece) for piece in codes.pieces))


def fired(codes: LossCodes, n_local: int) -> Bool[Array, " n"]:
    """Which of this device's latents are not 0 in any row of the global batch."""
    return firings(codes, n_local) > 0


def l0(codes: LossCodes) -> Float[Array, ""]:
    """Mean number of active latents a row, over the global batch."""
    active = row_sums(jax.lax.stop_gradient(codes), lambda c: c.values != 0)
    return ops.rows_mean(ops.latents_sum(active.astype(jnp.float32)))
