"""One update: loss, gradients, optimiser, and what the method does after a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saex.sae.base import split
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
    loss and every parameter after the update are finite.
    """
    tx = optim.transformation()
    specs = sae.specs()["params"]

    def step_fn(state: TrainState, batch: Batch, key: jax.Array, hyper: Params):
        trainable, frozen = split(state.params, specs)
        key = jax.random.fold_in(key, state.step)

        def objective(trainable):
            params = {**trainable, **frozen}
            return sae.loss(params, state.stats, batch, key, state.step, hyper)

        (loss, out), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        grads = sae.project_gradients(state.params, grads)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        lr = hyper["lr"] * optim.factor(state.step, steps)
        trainable = jax.tree.map(lambda p, u: p - lr * u, trainable, updates)
        state = state.replace(
            step=state.step + 1,
            params={**trainable, **frozen, **out.frozen},
            opt_state=opt_state,
            stats=out.stats,
        )
        state = sae.after_step(state, out, batch, key)
        finite = jnp.isfinite(loss)
        for p in jax.tree.leaves(state.params):
            finite &= jnp.isfinite(jnp.sum(p))
        metrics = {**out.metrics, "loss": loss, "grad_norm": norm, "lr": lr, "finite": finite}
        return state, metrics

    return jax.jit(step_fn, donate_argnums=0)


def hyper_arrays(sae: Any, optim: Optim, steps: int) -> Params:
    """The traced scalars of a single run of ``steps`` updates."""
    values = {**sae.hyper(), "lr": optim.learning_rate(sae.n), "steps": steps}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
