"""One update: loss, gradients, optimiser, and what the method does after a step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saex.sae.base import split
from saex.sharding import member_axis
from saex.train.descent import descend, descend_fused, fused
from saex.train.optim import Optim
from saex.train.state import TrainState
from saex.typing import Batch, Params


def make_step(
    sae: Any, optim: Optim, steps: int
) -> Callable[[TrainState, Batch, jax.Array, Params], tuple[TrainState, Params]]:
    """The jitted, donated step (state, batch, key, hyper) -> (state, metrics).

    batch: {column: [b, ...]} raw rows, split over the mesh's rows. key: seeds this run; the step
    number is folded in. hyper: ``sae.hyper()`` and "lr" as float32 scalars, traced. Metrics are
    scalars: the loss and its parts, gradient norm, learning rate, and ``finite``: whether the
    loss and every parameter after the update are finite. Where the loss is not, the batch is left
    out: it has no gradient, and statistics stay as they were.
    """
    return jax.jit(update(sae, optim, steps), donate_argnums=0)


def update(sae: Any, optim: Optim, steps: int) -> Callable:
    """What ``make_step`` compiles.

    On a mesh with a sweep axis every array but the batch has a leading axis of members. Their
    losses are summed, which leaves each its own gradient; what follows is mapped over them.
    """
    specs = sae.specs()["params"]

    def step_fn(state: TrainState, batch: Batch, key: jax.Array, hyper: Params):
        members = bool(member_axis(jax.sharding.get_abstract_mesh()))
        each = jax.vmap if members else lambda f: f
        trainable, frozen = split(state.params, specs)
        key = each(jax.random.fold_in)(key, state.step)

        def objective(trainable):
            params = {**trainable, **frozen}
            loss, out = sae.loss(params, state.stats, batch, key, state.step, hyper)
            return jnp.sum(loss), (loss, out)

        (_, (loss, out)), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        lr = hyper["lr"] * optim.factor(state.step, steps)
        # Mapped over a sharded axis, where a gradient would fail: none is taken from here on, and
        # sums are over a member's own devices. A kernel that is mapped over members was never
        # compiled: those get optax.
        how = descend_fused if fused(optim, sae) and not members else descend
        down = each(functools.partial(how, optim, sae.unit_rows))
        ok = jnp.isfinite(loss)
        trainable, opt_state, norm, total = down(trainable, grads, state.opt_state, lr, ok)
        old = {k: frozen[k] for k in out.frozen}, state.stats
        new = jax.tree.map(_laid_like, (out.frozen, out.stats), old)
        made, stats = each(_where)(ok, new, old)
        state = state.replace(
            step=state.step + 1,
            params={**trainable, **frozen, **made},
            opt_state=opt_state,
            stats=stats,
        )
        state = each(lambda s, o, k: sae.after_step(s, o, batch, k))(state, out, key)
        finite = each(_finite)(loss, total, {k: state.params[k] for k in frozen})
        metrics = {**out.metrics, "loss": loss, "grad_norm": norm, "lr": lr, "finite": finite}
        return state, metrics

    return step_fn


def _laid_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """What a method makes lies as its gradient would; what is kept may lie in smaller parts."""
    where = jax.typeof(old).sharding
    return new if jax.typeof(new).sharding == where else jax.reshard(new, where)


def _where(ok: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _finite(loss: jax.Array, total: jax.Array, frozen: Params) -> jax.Array:
    finite = jnp.isfinite(loss) & jnp.isfinite(total)
    for p in jax.tree.leaves(frozen):
        finite &= jnp.isfinite(jnp.sum(p))
    return finite


def hyper_arrays(sae: Any, optim: Optim, steps: int) -> Params:
    """The traced scalars of a single run of ``steps`` updates."""
    values = {**sae.hyper(), "lr": optim.learning_rate(sae.n), "steps": steps}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
