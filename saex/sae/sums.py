"""What codes of any form say of a batch: reconstructions, sums over latents, who fired."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels.sparse_decode import decode_lines, sparse_decode, sparse_take, sum_lines
from saex.sae import ops
from saex.sae.base import DenseCodes, LossCodes, RaggedCodes


def decode_part(codes: LossCodes, W_dec: Float[Array, "n d"], matmul_dtype: str = "float32") -> Any:
    """The reconstruction (without bias) of all devices' codes, float32 [b, d]."""
    if isinstance(codes, DenseCodes):
        return ops.latents_sum(decode_dense(codes, W_dec, matmul_dtype))
    args = ops.own((codes.values, codes.indices, W_dec))
    if isinstance(codes, RaggedCodes):
        return ops.latents_sum(decode_lines(*args, ops.own(codes.rows), codes.b))
    return ops.latents_sum(sparse_decode(*args))


def decode_dense(codes: DenseCodes, W_dec: Any, matmul_dtype: str) -> Any:
    """The product of this device's dense codes and latents, float32 [b, d]."""
    return jnp.einsum(
        "bn,nd->bd",
        codes.values.astype(matmul_dtype),
        W_dec.astype(matmul_dtype),
        preferred_element_type=jnp.float32,
    )


def of_rows(parts: Float[Array, " v"], codes: LossCodes) -> Float[Array, " b"]:
    """What each row has in all of what each line of its codes has."""
    if isinstance(codes, RaggedCodes):
        return sum_lines(*ops.own((parts, codes.rows)), codes.b)
    return parts


def row_sums(codes: LossCodes) -> Float[Array, " b"]:
    """For each row the sum of this device's codes."""
    return of_rows(jnp.sum(codes.values, axis=1), codes)


def weighed(codes: LossCodes, vector: Float[Array, " n"]) -> Float[Array, " b"]:
    """For each row the sum of codes times a number of each of this device's latents."""
    if isinstance(codes, DenseCodes):
        return codes.values @ vector
    return of_rows(jnp.sum(codes.values * of_latents(vector, codes), axis=1), codes)


def of_latents(vector: Float[Array, " n"], codes: LossCodes) -> Float[Array, "r c"]:
    """A number of each of this device's latents, shaped to meet the values of codes."""
    if isinstance(codes, DenseCodes):
        return vector[None]
    return sparse_take(ops.own(vector), codes.indices)


def firings(codes: LossCodes, n_local: int) -> Int[Array, " n"]:
    """In how many rows of the global batch each of this device's latents is not 0."""
    on = jax.lax.stop_gradient(codes.values) != 0
    if isinstance(codes, DenseCodes):
        return ops.rows_sum(jnp.sum(on, axis=0, dtype=jnp.int32))
    ones, none = on.reshape(-1).astype(jnp.int32), jnp.zeros((n_local,), jnp.int32)
    return ops.rows_sum(none.at[codes.indices.reshape(-1)].add(ones))


def fired(codes: LossCodes, n_local: int) -> Bool[Array, " n"]:
    """Which of this device's latents are not 0 in any row of the global batch."""
    return firings(codes, n_local) > 0


def l0(codes: LossCodes) -> Float[Array, ""]:
    """Mean number of active latents a row, over the global batch."""
    active = jnp.sum(jax.lax.stop_gradient(codes.values) != 0, axis=1).astype(jnp.float32)
    return ops.rows_mean(ops.latents_sum(of_rows(active, codes)))
