"""Adam whose moments take half the memory: bfloat16, rounded at random.

Rounding to nearest would freeze the second moment: b2 = 0.999 moves it by a thousandth, and
bfloat16 has steps of 1/256. Rounded up or down at random, in proportion, it is right on average.
The random bits are a hash of (step, place), so they are the same on every mesh.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class State(NamedTuple):
    """count: int32, updates done. mu, nu: bfloat16 moments."""

    count: Any
    mu: Any
    nu: Any


def scale_by_adam_bfloat16(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, with float32 arithmetic between moments kept in bfloat16."""

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params)
        return State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, params=None):
        count = state.count + 1
        old = jax.tree.map(lambda a: a.astype(jnp.float32), (state.mu, state.nu))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, old[0], updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, old[1], updates)
        c1, c2 = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu)
        return updates, State(count, _rounded(mu, count, 1), _rounded(nu, count, 2))

    return optax.GradientTransformation(init, update)


def _rounded(tree: Any, count: jax.Array, which: int) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    salts = (which + 2 * i for i in range(len(leaves)))
    return structure.unflatten(stochastic_round(x, count, salt) for x, salt in zip(leaves, salts))


def stochastic_round(x: jax.Array, count: jax.Array, salt: int = 0) -> jax.Array:
    """float32 to bfloat16, up with the probability that makes it right on average.

    Args:
      x: float32 of any shape; what is not finite stays as it is.
      count: int32, another one for other draws. salt: the same, static.
    """
    sharding = jax.typeof(x).sharding
    where = {} if sharding.mesh.empty else {"out_sharding": sharding}
    noise = _mix(count.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(salt))
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, **where)
        noise = _mix(noise + place * jnp.uint32(0x85EBCA77) + jnp.uint32(axis))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise & jnp.uint32(0xFFFF))
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
