"""Several reconstructions of one row by growing sets of latents, each latent decoded once.

A latent has a level, 0..levels-1. The reconstruction at level l is made of all codes at or below
it, so what is decoded level by level, and summed up, costs one decode, not ``levels``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.sae import affine, ops, pieces
from saex.sae.base import DenseCodes, LossCodes, MixedCodes, SparseCodes


@dataclasses.dataclass(frozen=True)
class Levels:
    """Fields:
    count: how many levels there are.
    slots: room for one level of one row of sparse codes.
    of: this device's latents by number (any shape) -> the level of each.
    ends: where each level ends, if that never changes and all latents are this device's: then
      dense codes cost one dense decode. None: ``count`` of them.
    """

    count: int
    slots: int
    of: Callable
    ends: tuple[int, ...] | None = None


def decode(
    params: Any,
    x: Float[Array, "b d"],
    codes: LossCodes,
    levels: Levels,
    matmul_dtype: str = "float32",
) -> Float[Array, "b levels o"]:
    """Reconstructions [b, levels, o], without bias: the sum over all devices' latents.

    What travels between devices that hold latents is ``levels`` reconstructions a row.

    Args:
      params, x: as ``affine.decode_chosen``, which sparse codes go through: pre-activations that
        were chosen without a gradient. Dense ones have their own.
      codes: no row of sparse ones has more of one level than there are slots.
    """
    if isinstance(codes, DenseCodes):
        return ops.latents_sum(_decode_dense(codes.values, params["W_dec"], levels, matmul_dtype))
    narrow = codes.pieces[0]
    level = levels.of(narrow.indices)
    parts = decode_chosen(params, x, narrow, level, levels.count, levels.slots)
    if isinstance(codes, MixedCodes):
        few = _decode_dense(codes.wide.values, params["W_dec"], levels, matmul_dtype)
        parts = parts + ops.latents_sum(pieces.spread(few, codes))
    return parts


def most_of_a_level(codes: SparseCodes, level: Int[Array, "b c"], levels: int) -> Int[Array, " b"]:
    """How many used slots of each row the level has that has most."""
    used = codes.values != 0
    counts = [jnp.sum(used & (level == at), axis=1, dtype=jnp.int32) for at in range(levels)]
    return jnp.max(jnp.stack(counts), axis=0)


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
) -> Float[Array, "b levels o"]:
    """``decode`` of sparse codes, by the level of each slot; ``slots`` as in ``by_level``."""
    apart = by_level(jax.lax.stop_gradient(codes), level, levels, slots)
    _, parts = affine.decode_chosen(params, jnp.repeat(x, levels, axis=0), apart)
    return jnp.cumsum(parts.reshape(-1, levels, parts.shape[1]), axis=1)


def _decode_dense(values: Any, W_dec: Any, levels: Levels, matmul_dtype: str) -> Any:
    ends = levels.ends
    level = None if ends else levels.of(jnp.arange(W_dec.shape[0]))[None]

    def only(at):
        if ends:
            mine = slice(ends[at - 1] if at else 0, ends[at])
            return pieces.decode_dense(DenseCodes(values[:, mine]), W_dec[mine], matmul_dtype)
        part = jnp.where(level == at, values, 0)
        return pieces.decode_dense(DenseCodes(part), W_dec, matmul_dtype)

    return jnp.cumsum(jnp.stack([only(at) for at in range(levels.count)], axis=1), axis=1)
