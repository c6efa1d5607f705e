"""A training step on what is found above thresholds that is exact: densely where there is no room.

There is room for a number of latents a row in the batch's mean. A step goes one of two ways, which
is the same on all devices: all that was to be found has room, and codes are ragged; or it has not,
and the whole batch is done densely.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from saex.kernels import zeros_as
from saex.kernels.encode_above import Above, encode_above
from saex.sae import ops
from saex.sae.base import ArraySpec
from saex.typing import Params

TRIED_EVERY = 16  # of many dense steps in a row; before, it is looked for more often

STATS = {
    "fallbacks": ArraySpec((), (), "int32", doc="steps that were done densely"),
    "fell_back": ArraySpec((), (), "int32", doc="how many in a row until now"),
}


def stats() -> Params:
    """``STATS`` at the start."""
    return {name: jnp.zeros((), jnp.int32) for name in STATS}


def found(
    stats: Params, weights: tuple[Any, Any, Any, Any], least: Any, room: int, matmul_dtype: str
) -> Above:
    """What ``encode_above`` finds, no gradient; not ``whole`` where it was not looked for.

    After some steps that were done densely the next is likely to be, too (the first ones of most
    runs are; all are where L0 stays large): after 3, 5, 6, 7, 9 to 15 of them, and so on, nothing
    is looked for. After one or two it is, since a single batch may be unlike the others.

    Args:
      stats: with ``STATS``. weights: x, b_pre, W_enc, b_enc. least, room: of ``encode_above``;
        least may be one number.
    """
    least = jnp.broadcast_to(least, weights[3].shape)
    weights = ops.own(jax.lax.stop_gradient((*weights, least)))
    dense = stats["fell_back"]
    tried = ((dense & (dense - 1)) == 0) | (dense % TRIED_EVERY == 0)  # 0, a power of 2, or so

    def look(weights):
        x, b_pre, W_enc, b_enc, least = weights
        return encode_above(x, b_pre, W_enc, b_enc, least, room, matmul_dtype)

    def pass_by(weights):
        shapes, b = jax.eval_shape(look, weights), weights[0].shape[0]
        zeros = jax.tree.map(lambda a: zeros_as(a.shape, weights[0], a.dtype), shapes)
        return zeros._replace(values=zeros.values - jnp.inf, rows=zeros.rows + b)

    return jax.lax.cond(tried, look, pass_by, weights)


def everywhere(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it is so on all devices of rows and latents."""
    return ops.rows_max(ops.latents_max(1 - flag.astype(jnp.int32))) == 0


def exactly(enough: Any, sparse: Callable, dense: Callable, weights: Any) -> Any:
    """``sparse(weights)`` where there is enough, else ``dense(weights)``, with its gradients.

    Value and gradients are made inside one branch, so that the other's arrays ([b, n] of the dense
    way) exist only where it is taken. Both return (scalar, auxiliary tree) of equal types.

    Args:
      enough: equal on all devices.
      sparse, dense: functions of ``weights`` alone (close over the rest).
      weights: a tree of arrays.

    Returns:
      (scalar, auxiliary tree); gradients reach ``weights`` through the scalar alone.
    """
    held = jax.lax.stop_gradient(weights)
    ways = [jax.value_and_grad(f, has_aux=True) for f in (sparse, dense)]
    (value, aux), grads = jax.lax.cond(enough, *ways, held)
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


def counted(aux: tuple, enough: Any = True) -> tuple:
    """What an objective hands out, with the step counted in its stats and told in its metrics.

    Metrics: "fallback", 1 if the step was done densely though it was to be sparse; "fallbacks",
    such steps so far.

    Args:
      aux: (metrics, stats with ``STATS``, and whatever else). enough: as ``exactly``; True: nothing
        sparse was wanted.
    """
    metrics, stats, *rest = aux
    fell = 1 - jnp.asarray(enough, jnp.int32)
    so_far, in_a_row = stats["fallbacks"] + fell, (stats["fell_back"] + fell) * fell
    told = {"fallback": fell.astype(jnp.float32), "fallbacks": so_far.astype(jnp.float32)}
    marks = {"fallbacks": so_far, "fell_back": in_a_row}
    return {**metrics, **told}, {**stats, **marks}, *rest
