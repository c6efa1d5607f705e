"""Sparse codes times a dictionary, and the two transposes of that product.

decode   y[b] = sum_j values[b, j] * rows[indices[b, j]]                       [b, d]
dots     dv[b, j] = <g[b], rows[indices[b, j]]>                                [b, k]
scatter  dW[i] = sum over (b, j) with indices[b, j] = i of values[b, j] * g[b]   [n, d]
sum      s[i] = sum over (b, j) with indices[b, j] = i of values[b, j]           [n]

The first three are each other's gradients, and ``sum`` is that of a look-up (``sparse_take``);
nothing of shape [b, k, d] or [b, n] is ever held on CPU. Sums over a latent have a fixed order.
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
    NaN or infinite is so in y (and in the gradients, where a row of g that is not finite may make
    other latents' NaN as well). Reverse-mode differentiable in values and rows.

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
    """The transpose of ``sparse_decode`` in its rows (no gradient of its own is defined)."""
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
