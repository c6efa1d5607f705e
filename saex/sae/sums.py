"""What codes of any form say of a batch: reconstructions, sums over latents, who fired."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from saex.kernels import target
from saex.kernels.sparse_decode import decode_lines, sparse_decode, sparse_take
from saex.sae import ops
from saex.sae.base import DenseCodes, LossCodes, RaggedCodes, mapped

PART = 16  # a sum over more than 32 numbers has its terms written out first by XLA on a CPU


def over_rows(terms: Shaped[Array, "b n"]) -> Shaped[Array, " n"]:
    """Sums over this device's rows; on a CPU in parts, see ``PART``."""
    whole = len(terms) // PART * PART
    if target() != "cpu" or not whole:
        return jnp.sum(terms, axis=0)
    parts = jnp.sum(terms[:whole].reshape(-1, PART, terms.shape[1]), axis=1)
    total = jnp.sum(jax.lax.optimization_barrier(parts), axis=0)
    return total + jnp.sum(terms[whole:], axis=0) if whole < len(terms) else total


def count(on: Bool[Array, "r c"]) -> Int[Array, ""]:
    """How many are set, below 2^31."""
    if target() == "cpu" and on.shape[1] == 1 and len(on) % PART == 0:  # lines of one slot
        on = on.reshape(PART, -1)
    return jnp.sum(over_rows(on.astype(jnp.int32)))


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


def mean_sum(codes: LossCodes, vector: Float[Array, " n"] | None = None) -> Float[Array, ""]:
    """The sum of a row's codes over all devices, in the mean of the global batch's rows.

    Args:
      codes: this device's.
      vector: a number of each of its latents, by which codes are multiplied; None: 1.
    """
    if vector is None:
        parts = over_rows(codes.values)
    elif isinstance(codes, DenseCodes):
        parts = over_rows(codes.values) * vector
    else:
        parts = over_rows(codes.values * of_latents(vector, codes))
    rows = codes.b if isinstance(codes, RaggedCodes) else len(codes.values)
    return ops.rows_mean(ops.latents_sum(jnp.sum(parts, dtype=jnp.float32) / rows)[None])


def of_latents(vector: Float[Array, " n"], codes: LossCodes) -> Float[Array, "r c"]:
    """A number of each of this device's latents, shaped to meet the values of codes."""
    if isinstance(codes, DenseCodes):
        return vector[None]
    return sparse_take(ops.own(vector), codes.indices)


def firings(codes: LossCodes, n_local: int) -> Int[Array, " n"]:
    """In how many rows of the global batch each of this device's latents is not 0."""
    on = jax.lax.stop_gradient(codes.values) != 0
    if isinstance(codes, DenseCodes):
        return ops.rows_sum(over_rows(on.astype(jnp.int32)))
    ones, none = on.reshape(-1).astype(jnp.int32), jnp.zeros((n_local,), jnp.int32)
    return ops.rows_sum(none.at[codes.indices.reshape(-1)].add(ones))


def fired(codes: LossCodes, n_local: int) -> Bool[Array, " n"]:
    """Which of this device's latents are not 0 in any row of the global batch."""
    return firings(codes, n_local) > 0


def l0(codes: LossCodes) -> Float[Array, ""]:
    """Mean number of active latents a row, over the global batch."""
    return mean_sum(mapped(lambda c: (c.values != 0).astype(jnp.int32), codes))
