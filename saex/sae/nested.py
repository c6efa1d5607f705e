"""Several reconstructions of one row by growing sets of latents, each latent decoded once.

A slot of sparse codes has a level, 0..levels-1. The reconstruction at level l is made of all slots
at or below it, so what is decoded level by level, and summed up, costs one decode, not ``levels``.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.sae import affine, ops, selection
from saex.sae.base import DenseCodes, SparseCodes


def by_level(
    codes: SparseCodes, level: Int[Array, "b c"], levels: int, slots: int
) -> tuple[SparseCodes, Bool[Array, ""]]:
    """The slots of each row put apart by their level, as codes of ``levels`` times as many rows.

    Args:
      codes: this device's. level: of each slot, 0..levels-1; that of an unused one does not matter.
      slots: room for one level of one row.

    Returns:
      (codes [b * levels, slots], fits): row ``b * levels + l`` holds row b's slots of level l, in
      their order; fits is False where a row of any device had more of one level than ``slots``.
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

    return SparseCodes(put(values), put(indices)), selection.everywhere(
        jnp.all(room | (values == 0), axis=1)
    )


def decode_chosen(
    params: Any, x: Float[Array, "b d"], codes: SparseCodes, levels: int
) -> Float[Array, "b levels o"]:
    """Reconstructions [b, levels, o], without bias, of codes as ``by_level`` hands them out.

    As ``affine.decode_chosen``: pre-activations that were chosen without a gradient. What travels
    between devices that hold latents is ``levels`` reconstructions a row.
    """
    x = jnp.repeat(x, levels, axis=0)
    _, parts = affine.decode_chosen(params, x, codes)
    return jnp.cumsum(parts.reshape(-1, levels, parts.shape[1]), axis=1)


def decode_dense(
    values: Float[Array, "b n"],
    level: Int[Array, " n"],
    W_dec: Float[Array, "n o"],
    levels: int,
    matmul_dtype: str = "float32",
    ends: tuple[int, ...] | None = None,
) -> Float[Array, "b levels o"]:
    """The same of dense codes, where ``level`` is that of each of this device's latents.

    Args:
      ends: where each level ends, if that never changes and all latents are this device's: then it
        costs one dense decode. None: ``levels`` of them.
    """

    def only(at):
        if ends is not None:
            mine = slice(ends[at - 1] if at else 0, ends[at])
            return ops.decode_part(DenseCodes(values[:, mine]), W_dec[mine], matmul_dtype)
        part = jnp.where(level[None] == at, values, 0)
        return ops.decode_part(DenseCodes(part), W_dec, matmul_dtype)

    return jnp.cumsum(jnp.stack([only(at) for at in range(levels)], axis=1), axis=1)
