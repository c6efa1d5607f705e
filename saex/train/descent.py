"""What gradients make of the params: optax, or where it pays one pass over each matrix."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from saex.kernels import target
from saex.kernels.adam import Scalars, adam, reference
from saex.kernels.adam.reference import tangent, unit_rows
from saex.sae import ops
from saex.sae.base import SparseCodes
from saex.train.optim import Optim
from saex.typing import Params


class Descended(NamedTuple):
    """params, opt_state: after the update. norm: of the gradient, made tangent, before clipping.
    total: sum of all params, finite if they are.
    """

    params: Any
    opt_state: Any
    norm: jax.Array
    total: jax.Array


def descend(
    optim: Optim,
    units: Sequence[str],
    params: Params,
    grads: Params,
    state: Any,
    rate: Any,
    ok: Any = True,
) -> Descended:
    """One update of the trainable params by the optax chain of ``optim``.

    Args:
      units: matrices whose rows have norm 1. Their gradient is taken without the part along each
        row, so that the step does not fight what follows: rows are brought back to norm 1.
      params, grads: by name. state: of the chain. rate: the step's learning rate, traced.
      ok: whether the gradient counts; if not it is 0, whatever is in it, and only what is left of
        the momentum moves the params.
    """
    grads = {k: tangent(params[k], g) if k in units else g for k, g in grads.items()}
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: jnp.where(ok, g, 0), grads)
    updates, state = optim.transformation().update(grads, state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    params = {k: unit_rows(p) if k in units else p for k, p in params.items()}
    return Descended(params, state, norm, _total(params))


def descend_fused(
    optim: Optim,
    units: Sequence[str],
    params: Params,
    grads: Params,
    state: Any,
    rate: Any,
    ok: Any = True,
    impl: str | None = None,
) -> Descended:
    """``descend`` to rounding, with one kernel for each matrix (``kernels.adam``).

    The norm that clipping compares must be known before, which reads each gradient once more.

    Args:
      impl: backend of ``kernels.adam``; the others as in ``descend``.
    """
    factor = jnp.ones(())
    if optim.clip is not None:
        made = {k: tangent(params[k], g) if k in units else g for k, g in grads.items()}
        size = optax.tree.norm(made)
        # A factor of 0 would hide an infinite gradient, which must show in the params.
        factor = jnp.where(jnp.isfinite(size), jnp.minimum(1.0, optim.clip / size), jnp.nan)
    factor = jnp.where(ok, factor, 0)
    moments: Any = state[-1]
    count = optax.safe_increment(moments.count)
    scalars = Scalars(rate, 1 - optim.b1**count, 1 - optim.b2**count, factor)
    updated, squares, total = {}, jnp.zeros(()), jnp.zeros(())
    for k, p in params.items():
        one = functools.partial(_one, optim, k in units, impl)
        arrays = (p, grads[k], moments.mu[k], moments.nu[k])
        updated[k], sums = one(arrays, tuple(scalars))
        squares, total = squares + sums[0], total + sums[1]
    params, mu, nu = ({k: v[i] for k, v in updated.items()} for i in range(3))
    moments = optax.ScaleByAdamState(count, mu, nu)
    return Descended(params, (*state[:-1], moments), jnp.sqrt(squares), total)


def _one(
    optim: Optim, unit: bool, impl: str | None, arrays: tuple, scalars: tuple
) -> tuple[tuple, tuple]:
    """((array, mu, nu), sums) of one of the params: by XLA vectors, and rows that devices share."""
    p, g, mu, nu = arrays
    fixed = (optim.b1, optim.b2), optim.eps, unit
    if p.ndim != 2 or not ops.rows_whole(p):
        out: Any = reference.adam(p, g, mu, nu, Scalars(*scalars), *fixed)
        return out[:3], out[3:]

    def part(arrays, scalars):
        p, g, mu, nu = arrays
        out = adam(p, g, mu, nu, Scalars(*scalars), *fixed, impl)
        return tuple(out[:3]), tuple(out[3:])

    return ops.on_rows(part, arrays, scalars)


def fused(optim: Optim, sae: Any) -> bool:
    """Whether ``descend_fused`` is for the target (``kernels.adam`` says why TPUs).

    Not for dense codes, where XLA can move the weights in the matmul that makes their gradient.
    Methods that return dense codes and train on ragged ones would gain, and were not compiled so.
    """
    return target() == "tpu" and optim.moments == "float32" and sae.codes is SparseCodes


def _total(params: Params) -> jax.Array:
    return sum((jnp.sum(p) for p in params.values()), jnp.zeros(()))
