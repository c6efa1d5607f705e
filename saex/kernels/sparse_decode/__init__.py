"""Sparse codes times a dictionary, and the two transposes of that product.

decode   y[b] = sum_j values[b, j] * rows[indices[b, j]]                       [b, d]
dots     dv[b, j] = <g[b], rows[indices[b, j]]>                                [b, k]
scatter  dW[i] = sum over (b, j) with indices[b, j] = i of values[b, j] * g[b]   [n, d]
sum      s[i] = sum over (b, j) with indices[b, j] = i of values[b, j]           [n]

The first three are each other's gradients, and ``sum`` is that of a look-up (``sparse_take``);
nothing of shape [b, k, d] is ever held on CPU, and [b, n] only of blocks of rows where latents are
few (``cpu.NARROW``). Sums over a latent have a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import late, pick
from saex.kernels.sparse_decode import cpu, reference, xla_gpu

DECODE = {
    "reference": reference.decode,
    "cpu": cpu.decode,
    "gpu": xla_gpu.decode,
    # Opt in by name until a GPU has measured it against "gpu".
    "pallas_gpu": late("saex.kernels.sparse_decode.pallas_gpu", "decode"),
    "pallas_tpu": late("saex.kernels.sparse_decode.pallas_tpu", "decode"),
    # XLA's own gather holds [b, k, d]: 4.6 GB of temporaries at (8192, 2304, 65536, 64), v5e
    # and v5p compilers; the kernels none. Nobody has timed either.
    "tpu": late("saex.kernels.sparse_decode.pallas_tpu", "decode"),
}
DOTS = {
    "reference": reference.dots,
    "cpu": cpu.dots,
    "gpu": xla_gpu.dots,
    "pallas_gpu": late("saex.kernels.sparse_decode.pallas_gpu", "dots"),
    "pallas_tpu": late("saex.kernels.sparse_decode.pallas_tpu", "dots"),
    "tpu": late("saex.kernels.sparse_decode.pallas_tpu", "dots"),
}
SCATTER = {
    "reference": reference.scatter,
    "cpu": cpu.scatter,
    "gpu": xla_gpu.scatter,
    "pallas_gpu": late("saex.kernels.sparse_decode.pallas_gpu", "scatter"),
    "pallas_tpu": late("saex.kernels.sparse_decode.pallas_tpu", "scatter"),
    "tpu": late("saex.kernels.sparse_decode.pallas_tpu", "scatter"),
}
SUM = {  # of scalars, which no kernel need be written for: XLA's form for the platform
    "reference": reference.sums,
    "cpu": reference.sums,
    "gpu": xla_gpu.sums,
    "pallas_gpu": xla_gpu.sums,
    "pallas_tpu": reference.sums,
    "tpu": reference.sums,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sparse_decode(
    values: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    rows: Float[Array, "n d"],
    impl: str | None = None,
) -> Float[Array, "b d"]:
    """Sum of ``values[b, j] * rows[indices[b, j]]`` over j, accumulated in float32.

    A slot of value 0 adds nothing, whatever its index, as long as the row that it names is finite:
    0 times infinity is NaN, except on TPU, which reads no such row. A value or row in use that is
    NaN or infinite is so in y, and is not finite in the gradients, where a row of g that is not
    finite may make other latents' NaN as well. Reverse-mode differentiable in values and rows.

    Raises:
      ValueError: an unknown ``impl``.
    """
    return pick(DECODE, impl)(values, indices, rows)


def _forward(values, indices, rows, impl):
    return sparse_decode(values, indices, rows, impl), (values, indices, rows)


def _backward(impl, residuals, g):
    values, indices, rows = residuals
    dvalues = pick(DOTS, impl)(indices, g, rows).astype(values.dtype)
    drows = pick(SCATTER, impl)(values, indices, g, rows.shape[0]).astype(rows.dtype)
    return dvalues, None, drows


sparse_decode.defvjp(_forward, _backward)


def sparse_scatter(
    values: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    g: Float[Array, "b d"],
    n: int,
    impl: str | None = None,
) -> Float[Array, "n d"]:
    """The transpose of ``sparse_decode`` in its rows (no gradient of its own is defined).

    Indices are below n and not negative.
    """
    return pick(SCATTER, impl)(values, indices, g, n)


def sparse_sum(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], n: int, impl: str | None = None
) -> Float[Array, " n"]:
    """Sum of the values at each index: a bias' gradient, or how much each latent fired."""
    return pick(SUM, impl)(values, indices, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sparse_take(
    table: Float[Array, "n *d"], indices: Int[Array, "b k"], impl: str | None = None
) -> Float[Array, "b k *d"]:
    """``table[indices]``, a number or a row [d] of each latent; its gradient sums in a fixed order.

    That of plain indexing is a scatter-add, which on a GPU adds in any order.
    """
    return table[indices]


def _take_forward(table, indices, impl):
    return table[indices], (table, indices)


def _take_backward(impl, residuals, g):
    table, indices = residuals
    if table.ndim == 1:
        return sparse_sum(g, indices, table.shape[0], impl), None
    slots, rows = indices.reshape(-1, 1), g.reshape(-1, g.shape[-1])  # each slot has its own row
    ones = jnp.ones_like(slots, g.dtype)
    return sparse_scatter(ones, slots, rows, table.shape[0], impl).astype(table.dtype), None


sparse_take.defvjp(_take_forward, _take_backward)


# ---------------------------------------------------------------------- lines, several of one row
#
# Codes [v, s] of b rows come with ``owner`` [v], int32: whose row each line is, in rising order, b
# for nobody's, which come last.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def decode_lines(
    values: Float[Array, "v s"],
    indices: Int[Array, "v s"],
    rows: Float[Array, "n d"],
    owner: Int[Array, " v"],
    b: int,
    impl: str | None = None,
) -> Float[Array, "b d"]:
    """``sparse_decode`` of all lines of each of b rows."""
    if by_blocks(impl):
        return cpu.decode_lines(values, indices, rows, owner, b)
    return sum_lines(pick(DECODE, impl)(values, indices, rows), owner, b, impl)


def _decode_lines_forward(values, indices, rows, owner, b, impl):
    args = values, indices, rows, owner
    return decode_lines(*args, b, impl), args


def _decode_lines_backward(b, impl, residuals, g):
    values, indices, rows, owner = residuals
    dvalues = dots_lines(indices, g, rows, owner, impl).astype(values.dtype)
    drows = scatter_lines(values, indices, g, owner, rows.shape[0], impl).astype(rows.dtype)
    return dvalues, None, drows, None


decode_lines.defvjp(_decode_lines_forward, _decode_lines_backward)


def dots_lines(
    indices: Int[Array, "v s"],
    g: Float[Array, "b d"],
    rows: Float[Array, "n d"],
    owner: Int[Array, " v"],
    impl: str | None = None,
) -> Float[Array, "v s"]:
    """<g of a line's row, rows[indices]>; lines of nobody may have anything finite."""
    if by_blocks(impl):
        return cpu.dots_lines(indices, g, rows, owner)
    return pick(DOTS, impl)(indices, take_lines(g, owner), rows)


def scatter_lines(
    values: Float[Array, "v s"],
    indices: Int[Array, "v s"],
    g: Float[Array, "b d"],
    owner: Int[Array, " v"],
    n: int,
    impl: str | None = None,
) -> Float[Array, "n d"]:
    """The transpose of ``decode_lines`` in its rows."""
    if by_blocks(impl):
        return cpu.scatter_lines(values, indices, g, owner, n)
    return pick(SCATTER, impl)(values, indices, take_lines(g, owner), n)


def by_blocks(impl: str | None) -> bool:
    """Whether lines are done a block at a time, without an array of what each has of its row."""
    return pick(DECODE, impl) is cpu.decode


def sum_lines(
    lines: Float[Array, "v d"], owner: Int[Array, " v"], b: int, impl: str | None = None
) -> Float[Array, "b d"]:
    """For each of b rows the sum of its lines, in a fixed order (no gradient of its own)."""
    used, whose = (owner < b)[:, None], jnp.where(owner < b, owner, 0)[:, None]
    return sparse_scatter(used.astype(lines.dtype), whose, lines, b, impl)


def take_lines(x: Float[Array, "b *d"], owner: Int[Array, " v"]) -> Float[Array, "v *d"]:
    """What each line's row has in x; 0 for nobody's."""
    return x.at[owner].get(mode="fill", fill_value=0)
