"""Adam's moments in bfloat16: right on average, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex.sae import TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train.moments import scale_by_adam_bfloat16, stochastic_round
from saex.train.optim import Optim
from tests.sae import toy


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.float32(1 + 1 / 1024) * jnp.ones((64, 64))  # an eighth of a step above 1
    means = [float(stochastic_round(x, jnp.int32(i)).astype(jnp.float32).mean()) for i in range(8)]
    assert len(set(means)) == 8
    np.testing.assert_allclose(np.mean(means), 1 + 1 / 1024, atol=1e-4)
    exact = jnp.asarray([0.0, -0.0, 1.5, -256.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(stochastic_round(exact, jnp.int32(3)), exact)
    assert np.isnan(float(stochastic_round(jnp.float32(jnp.nan), jnp.int32(3))))


def test_the_second_moment_moves_where_rounding_to_nearest_would_stop():
    """A gradient that grows tenfold: the moment has to follow through steps of a thousandth."""
    tx, exact = scale_by_adam_bfloat16(0.9, 0.999, 1e-8), optax.scale_by_adam(0.9, 0.999, 1e-8)
    grads = {"w": jnp.ones((32, 32))}
    state, other = tx.init(grads), exact.init(grads)
    nearest = jnp.zeros(())
    step, step_exact = jax.jit(tx.update), jax.jit(exact.update)
    for i in range(600):
        g = {"w": grads["w"] * (1.0 if i < 300 else 1.5)}
        _, state = step(g, state)
        _, other = step_exact(g, other)
        nearest = (0.999 * nearest + 0.001 * g["w"][0, 0] ** 2).astype(jnp.bfloat16).astype(float)
    wanted = float(other.nu["w"].mean())
    got = np.asarray(state.nu["w"], np.float32)
    np.testing.assert_allclose(got.mean(), wanted, rtol=0.01)
    assert abs(float(nearest) / wanted - 1) > 0.2  # the control: without the draws it is stuck
    assert state.nu["w"].dtype == jnp.bfloat16


def losses(moments, mesh):
    truth = toy.directions(40, 16)
    optim = Optim(lr=3e-3, moments=moments)
    _, history = toy.fit(
        TopK(16, 64, 4), lambda i: toy.batch(truth, 128, 3, i), optim, make_mesh(mesh), 40
    )
    return np.array([m["loss"] for m in history])


@pytest.mark.slow
def test_training_is_as_good_and_the_same_on_a_mesh():
    full, half = losses("float32", MeshConfig()), losses("bfloat16", MeshConfig())
    assert full[-1] < 0.7 * full[0]
    np.testing.assert_allclose(half[-10:].mean(), full[-10:].mean(), rtol=0.02)
    assert not np.array_equal(half, full)
    np.testing.assert_allclose(losses("bfloat16", MeshConfig(2, 4))[:20], half[:20], rtol=1e-4)
