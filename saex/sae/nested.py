"""Several reconstructions of one row by growing sets of latents, each latent decoded once.

A latent has a level, 0..levels-1. The reconstruction at level l is made of all codes at or below
it, so what is decoded level by level, and summed up, costs one decode, not ``levels``.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.sae import affine, ops, sums
from saex.sae.base import DenseCodes, RaggedCodes, SparseCodes


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
      codes: no line of ragged ones holds latents of two levels.
    """
    if isinstance(codes, DenseCodes):
        return ops.latents_sum(_decode_dense(codes.values, params["W_dec"], levels, matmul_dtype))
    groups, b = codes.rows * levels.count + levels.of(codes.indices[:, 0]), codes.b * levels.count
    groups = jnp.where(codes.rows < codes.b, groups, b)
    _, parts = affine.decode_chosen(params, x, codes.replace(rows=groups, b=b), levels.count)
    return _summed_up(parts.reshape(-1, levels.count, parts.shape[1]))


def by_level(codes: SparseCodes, level: Int[Array, "b c"], levels: int, slots: int) -> SparseCodes:
    """The slots of each row put apart by their level, as codes of ``levels`` times as many rows.

    Args:
      codes: this device's. level: of each slot, 0..levels-1; that of an unused one does not matter.
      slots: room for one level of one row; what has none is lost.

    Returns:
      [b * levels, slots]: row ``b * levels + l`` holds row b's slots of level l, in their order.
    """
    values, indices = codes.values, codes.indices
    b = values.shape[0]
    used = (level[:, :, None] == jnp.arange(levels)[None, None]) & (values != 0)[:, :, None]
    before = jnp.cumsum(used.astype(jnp.int32), axis=1) - 1
    rank = jnp.take_along_axis(before, level[:, :, None], axis=2)[:, :, 0]
    room = (values != 0) & (rank < slots)
    place = jnp.where(room, level * slots + rank, levels * slots)
    rows = jnp.arange(b)[:, None]

    def put(a):
        table = jnp.zeros((b, levels * slots + 1), a.dtype).at[rows, place].set(a)
        return table[:, :-1].reshape(b * levels, slots)

    return SparseCodes(put(values), put(indices))


def decode_chosen(
    params: Any,
    x: Float[Array, "b d"],
    codes: SparseCodes,
    level: Int[Array, "b c"],
    levels: int,
    slots: int,
) -> list[Float[Array, "b o"]]:
    """``decode`` of sparse codes, by the level of each slot; ``slots`` as in ``by_level``."""
    apart = by_level(jax.lax.stop_gradient(codes), level, levels, slots)
    _, parts = affine.decode_chosen(params, jnp.repeat(x, levels, axis=0), apart)
    return _summed_up(parts.reshape(-1, levels, parts.shape[1]))


def _summed_up(parts: Float[Array, "b levels o"]) -> list[Float[Array, "b o"]]:
    """Each level with those below it."""
    return list(itertools.accumulate(parts[:, at] for at in range(parts.shape[1])))


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
