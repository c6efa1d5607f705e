"""The update on TPU: a block of rows is read once and written once, in place.

Interpreted kernels cannot alias what the last block reaches beyond: where n is no multiple of 8,
the new matrices are others than the old.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from saex.kernels import like

LANES, SUBLANES = 128, 8
VMEM = 9 << 20  # bytes for blocks
SPARE = 4 << 20  # and for what else the compiler puts there


def block_rows(n: int, d: int) -> int:
    """Rows of a block: of those that fit the most that divide n, or where none does so many.

    Latents that are 8 times a prime have blocks of 8 rows, and many of them.
    """
    fit = min(VMEM // vmem_bytes(1, d) // SUBLANES * SUBLANES, 512, n // SUBLANES * SUBLANES)
    fit = max(SUBLANES, fit)
    return next((size for size in range(fit, 0, -SUBLANES) if n % size == 0), fit)


def vmem_bytes(rows: int, d: int) -> int:
    """VMEM of blocks of so many rows: four in and three out, each twice, and four between."""
    return (7 * 2 + 4) * 4 * rows * (-(-d // LANES) * LANES)


def hbm_bytes(n: int, d: int) -> int:
    """Bytes from and to HBM: the matrix and two moments read and written, the gradient read."""
    return 28 * n * d


def adam(rows, g, mu, nu, scalars, betas, eps, unit):
    """See ``kernels.adam.adam``. Sums run over the blocks in their order."""
    n, d = rows.shape
    size = block_rows(n, d)
    block = pl.BlockSpec((size, d), lambda i: (i, 0))
    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    kernel = functools.partial(_kernel, n, betas, eps, unit)
    matrix, sums = like(rows, (n, d)), like(rows, (2,))
    new, mu, nu, sums = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, size),),
        in_specs=[whole, *[block] * 4],
        out_specs=[*[block] * 3, whole],
        out_shape=[*[matrix] * 3, sums],
        input_output_aliases={} if n % size else {1: 0, 3: 1, 4: 2},  # in place
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes(size, d) + SPARE
        ),
        cost_estimate=pl.CostEstimate(
            flops=20 * n * d, bytes_accessed=hbm_bytes(n, d), transcendentals=n * d
        ),
        name="adam",
    )(jnp.stack(scalars), rows, g, mu, nu)
    return new, mu, nu, sums[0], sums[1]


def _kernel(n, betas, eps, unit, scalars, rows, g, mu, nu, new_rows, new_mu, new_nu, sums):
    i, size = pl.program_id(0), rows.shape[0]
    rate, c1, c2, factor = (scalars[j] for j in range(4))
    (b1, b2), W, G = betas, rows[...], g[...]
    if unit:
        G = G - jnp.sum(G * W, axis=1, keepdims=True) * W
    squares = jnp.sum(G * G, axis=1, keepdims=True)
    G = jnp.where(factor == 0, 0.0, G * factor)
    m = (1 - b1) * G + b1 * mu[...]
    v = (1 - b2) * (G * G) + b2 * nu[...]
    W = W - rate * ((m / c1) / (jnp.sqrt(v / c2) + eps))
    if unit:
        W = W / jnp.maximum(jnp.sqrt(jnp.sum(W * W, axis=1, keepdims=True)), 1e-12)
    new_rows[...], new_mu[...], new_nu[...] = W, m, v
    # The last block may reach beyond the matrix.
    mine = i * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < n

    @pl.when(i == 0)
    def _():
        sums[0] = 0.0
        sums[1] = 0.0

    sums[0] += jnp.sum(jnp.where(mine, squares, 0))
    sums[1] += jnp.sum(jnp.where(mine, jnp.sum(W, axis=1, keepdims=True), 0))
