"""A training step on candidates that is exact: sparsely where they do, densely where they do not.

Candidates are the largest pre-activations of each row, of a fixed number. A row that may have had
more is *wide* (on that device of latents). A step goes one of three ways, which is the same on all
devices: no row is wide, and codes are sparse; a few are, and these are done densely beside the
others (``MixedCodes``); or more than there is room for, and the whole batch is done densely. Real
rows differ by ten times in how many latents they need, few of them by much.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.encode_topk import encode_topk
from saex.sae import ops
from saex.sae.base import ArraySpec, DenseCodes, MixedCodes, SparseCodes
from saex.typing import Params

SPARSE, MIXED, DENSE = 0, 1, 2  # the ways
TRIED_EVERY = 16  # of many dense steps in a row; before, candidates are looked for more often

STATS = {
    "fallbacks": ArraySpec((), (), "int32", doc="steps that were done densely"),
    "fell_back": ArraySpec((), (), "int32", doc="how many in a row until now"),
}


def stats() -> Params:
    """``STATS`` at the start."""
    return {name: jnp.zeros((), jnp.int32) for name in STATS}


def room(b: int) -> int:
    """How many of a device's b rows may be done densely beside the others."""
    return max(1, b // 32)


def candidates(
    stats: Params,
    weights: tuple[Any, Any, Any, Any],
    size: int,
    matmul_dtype: str,
) -> tuple[Float[Array, "b c"], Int[Array, "b c"], Bool[Array, ""]]:
    """(values, indices, tried): the ``size`` largest pre-activations of each row, no gradient.

    After some steps that were done densely the next is likely to be, too (the first ones of most
    runs are; all are where L0 stays large): after 3, 5, 6, 7, 9 to 15 of them, and so on, they are
    not looked for, ``tried`` is False and the arrays hold zeros. After one or two they are, since a
    single batch may be unlike the others.

    Args:
      stats: with ``STATS``. weights: x, b_pre, W_enc, b_enc of ``encode_topk``.
    """
    weights = ops.own(jax.lax.stop_gradient(weights))
    dense = stats["fell_back"]
    tried = ((dense & (dense - 1)) == 0) | (dense % TRIED_EVERY == 0)  # 0, a power of 2, or so

    def look(weights):
        chosen: tuple = encode_topk(*weights, size, matmul_dtype)
        return chosen[0], chosen[1]

    def pass_by(weights):
        shape = (weights[0].shape[0], size)
        return zeros_as(shape, weights[0]), zeros_as(shape, weights[0], jnp.int32)

    values, indices = jax.lax.cond(tried, look, pass_by, weights)
    return values, indices, tried


def way(wide: Bool[Array, " b"], tried: Any = True) -> Int[Array, ""]:
    """The way that a step has to go, equal on all devices.

    Args:
      wide: which rows may have had more candidates on this device.
      tried: whether there are candidates.
    """
    most = ops.rows_max(ops.latents_max(jnp.sum(wide, dtype=jnp.int32)))
    few = jnp.where(most > room(wide.shape[0]), DENSE, MIXED)
    return jnp.where(tried, jnp.where(most == 0, SPARSE, few), DENSE)


def wide_rows(wide: Bool[Array, " b"]) -> tuple[Int[Array, " m"], Int[Array, " b"]]:
    """(rows, places) of ``MixedCodes``: the first wide rows, as many as there is room for."""
    b = wide.shape[0]
    m = room(b)
    places = jnp.where(wide, jnp.cumsum(wide, dtype=jnp.int32) - 1, m)
    (rows,) = jnp.nonzero(wide, size=m, fill_value=b)
    return rows.astype(jnp.int32), jnp.minimum(places, m)


def of_rows(x: Float[Array, "b d"], rows: Int[Array, " m"]) -> Float[Array, "m d"]:
    """Those rows of x, zeros where there is none."""
    return x.at[rows].get(mode="fill", fill_value=0)


def mixed(
    narrow: SparseCodes, wide: Float[Array, "m n"], rows: Int[Array, " m"], places: Any
) -> MixedCodes:
    """Codes of both pieces."""
    return MixedCodes(narrow, DenseCodes(wide), rows, places)


def exactly(way: Any, sparse: Callable, mixed: Callable, dense: Callable, weights: Any) -> Any:
    """``sparse(weights)``, ``mixed(weights)`` or ``dense(weights)``, with that one's gradients.

    Value and gradients are made inside one branch, so that the others' arrays ([b, n] of the dense
    way) exist only where it is taken. All return (scalar, auxiliary tree) of equal types.

    Args:
      way: SPARSE, MIXED or DENSE, equal on all devices.
      sparse, mixed, dense: functions of ``weights`` alone (close over the rest).
      weights: a tree of arrays.

    Returns:
      (scalar, auxiliary tree); gradients reach ``weights`` through the scalar alone.
    """
    held = jax.lax.stop_gradient(weights)
    ways = [jax.value_and_grad(f, has_aux=True) for f in (sparse, mixed, dense)]
    (value, aux), grads = jax.lax.switch(way, ways, held)
    return _with_gradient(value, grads, weights), jax.lax.stop_gradient(aux)


@jax.custom_vjp
def _with_gradient(value: Any, grads: Any, weights: Any) -> Any:
    """``value``, whose gradient in ``weights`` is ``grads``."""
    return value


def _forward(value, grads, weights):
    return value, grads


def _backward(grads, cotangent):
    return None, None, jax.tree.map(lambda g: g * cotangent, grads)


_with_gradient.defvjp(_forward, _backward)


def counted(aux: tuple, way: Any, wide: Any = None) -> tuple:
    """What an objective hands out, with the step counted in its stats and told in its metrics.

    Metrics: "fallback", 1 if the step was done densely though there were to be candidates;
    "fallbacks", such steps so far; "wide_rows", the share of rows that were done densely.

    Args:
      aux: (metrics, stats with ``STATS``, and whatever else). way: that the step went.
      wide: [b], which rows were wide on this device; None: no candidates were wanted.
    """
    metrics, stats, *rest = aux
    fell = jnp.asarray(way == DENSE, jnp.int32)
    so_far, in_a_row = stats["fallbacks"] + fell, (stats["fell_back"] + fell) * fell
    told = {"fallback": fell.astype(jnp.float32), "fallbacks": so_far.astype(jnp.float32)}
    if wide is not None:
        share = ops.rows_mean(ops.latents_max(wide.astype(jnp.float32)))
        told["wide_rows"] = jnp.where(way == DENSE, 1.0, share)
    marks = {"fallbacks": so_far, "fell_back": in_a_row}
    return {**metrics, **told}, {**stats, **marks}, *rest
