"""bfloat16: products of it, and rows in it, train every method as float32 does."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex.sae import SAES
from saex.sae.base import split
from tests.sae import toy
from tests.sae.small import SMALL, small

STEPS, ROWS, LR = 30, 64, 3e-3


def descended(sae, start, batch):
    """(losses of Adam's steps on one batch, params)."""
    specs, tx = sae.specs()["params"], optax.adam(LR)
    hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": STEPS}.items()}

    def step(carry, i):
        params, stats, moments = carry
        trainable, frozen = split(params, specs)

        def loss(trainable):
            return sae.loss({**trainable, **frozen}, stats, batch, jax.random.key(i), i, hyper)

        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        updates, moments = tx.update(grads, moments)
        trainable = optax.apply_updates(trainable, updates)
        for name in sae.unit_rows:
            norms = jnp.linalg.norm(trainable[name], axis=1, keepdims=True)
            trainable[name] = trainable[name] / norms
        state = State({**trainable, **frozen, **out.frozen})
        return (sae.after_step(state, out, batch, None).params, out.stats, moments), value

    @jax.jit
    def run(params, stats):
        start = params, stats, tx.init(split(params, specs)[0])
        (params, _, _), values = jax.lax.scan(step, start, jnp.arange(STEPS))
        return values, params

    return jax.device_get(run(*start))


class State(types.SimpleNamespace):
    """What ``after_step`` of a dictionary takes of a train state."""

    def __init__(self, params):
        super().__init__(params=params)

    def replace(self, params):
        return State(params)


@pytest.mark.parametrize("name", sorted(SAES))
def test_losses_are_nearly_those_of_float32(name):
    dense = (
        {"capacity": 0} if "capacity" in SMALL.get(name, {}) else {}
    )  # one way compiles in half the time
    sae, half = (small(name, **dense, matmul_dtype=d) for d in ("float32", "bfloat16"))
    x = 3 * toy.batch(toy.directions(40, sae.d_in), ROWS, 3, 1) + 0.5
    batch = jax.tree.map(jnp.asarray, toy.columns(sae, x, 0))
    rounded = {k: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v for k, v in batch.items()}
    start = jax.jit(sae.init)(jax.random.key(0), batch)
    losses, _ = descended(sae, start, batch)
    half, params = descended(half, start, rounded)
    assert np.isfinite(half).all() and all(np.isfinite(v).all() for v in params.values())
    assert half[-1] < 0.95 * half[0]
    # a pursuit is greedy: an atom that is chosen otherwise changes all that come after it
    apart = 0.1 if name == "matching_pursuit" else 0.05
    np.testing.assert_allclose(half[-1], losses[-1], rtol=apart)
    assert np.abs(half - losses).max() > 0  # it is another arithmetic
    assert all(v.dtype == np.float32 for v in params.values())
