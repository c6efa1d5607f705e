"""Several reconstructions of one row by growing sets of latents, each latent decoded once.

A latent has a level, 0..levels-1. The reconstruction at level l is made of all codes at or below
it, so what is decoded level by level, and summed up, costs one decode, not ``levels``.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.sae import affine, ops, sums
from saex.sae.base import DenseCodes, RaggedCodes


@dataclasses.dataclass(frozen=True)
class Levels:
    """Fields:
    count: how many levels there are.
    of: this device's latents by number (any shape) -> the level of each.
    ends: where each level ends, if that never changes and all latents are this device's: then
      dense codes cost one dense decode. None: ``count`` of them.
    """

    count: int
    of: Callable
    ends: tuple[int, ...] | None = None


def decode(
    params: Any,
    x: Float[Array, "b d"],
    codes: DenseCodes | RaggedCodes,
    levels: Levels,
    matmul_dtype: str = "float32",
) -> list[Float[Array, "b o"]]:
    """The reconstruction of each level, without bias: the sum over all devices' latents.

    What travels between devices that hold latents is ``levels`` reconstructions a row.

    Args:
      params, x: as ``affine.decode_chosen``, which ragged codes go through: pre-activations that
        were chosen without a gradient. Dense ones have their own.
      codes: ragged ones with as many levels.
    """
    if isinstance(codes, DenseCodes):
        return ops.latents_sum(_decode_dense(codes.values, params["W_dec"], levels, matmul_dtype))
    return decode_ragged(params, x, codes)


def decode_ragged(
    params: Any, x: Float[Array, "b d"], codes: RaggedCodes
) -> list[Float[Array, "b o"]]:
    """``decode`` of codes that know their levels."""
    _, parts = affine.decode_chosen(params, x, codes)
    parts = parts.reshape(-1, codes.levels, parts.shape[1])
    return list(itertools.accumulate(parts[:, at] for at in range(codes.levels)))


def _decode_dense(values: Any, W_dec: Any, levels: Levels, matmul_dtype: str) -> list[Any]:
    ends = levels.ends
    level = None if ends else levels.of(jnp.arange(W_dec.shape[0]))[None]

    def only(at):
        if ends:
            mine = slice(ends[at - 1] if at else 0, ends[at])
            return sums.decode_dense(DenseCodes(values[:, mine]), W_dec[mine], matmul_dtype)
        part = jnp.where(level == at, values, 0)
        return sums.decode_dense(DenseCodes(part), W_dec, matmul_dtype)

    return list(itertools.accumulate(only(at) for at in range(levels.count)))
