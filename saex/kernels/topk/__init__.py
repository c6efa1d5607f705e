"""Exact top-k of each row, with indices; at the cut, among equals, the lowest index wins."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import late, pick
from saex.kernels.topk import cpu, reference, xla_gpu

IMPLS = {
    "reference": reference.top_k,
    "cpu": cpu.top_k,
    "gpu": xla_gpu.top_k,
    "pallas_tpu": late("saex.kernels.topk.pallas_tpu", "top_k"),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def top_k(
    scores: Float[Array, "b n"], k: int, impl: str | None = None
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The ``k`` largest entries of each row, largest first, and their positions (int32).

    Among equal scores the lower position comes first, on every backend. -inf is an ordinary
    lowest score and -0 is equal to 0, as which it comes out. NaN, whatever its sign, is equal to
    itself and larger than infinity: a row that holds one has NaN as its first value. The gradient
    of the values goes to the chosen positions.

    Args:
      scores: selection is made in this dtype; hand in float32 on CPU (bf16 is 100x slower there).
      k: at most n.
      impl: a name from ``IMPLS``, or None for the target's own.

    Raises:
      ValueError: ``k`` outside of 1..n, or an unknown ``impl``.
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of n={n} scores: k must be between 1 and n")
    return pick(IMPLS, impl)(scores, k)


@top_k.defjvp
def _top_k_jvp(k, impl, primals, tangents):
    values, indices = top_k(primals[0], k, impl)
    moved = jnp.take_along_axis(tangents[0], indices, axis=-1)
    return (values, indices), (moved, jnp.zeros(indices.shape, jax.dtypes.float0))
