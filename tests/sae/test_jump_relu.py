"""What the JumpReLU card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import JumpReLU
from saex.sae.activations import jump, step_up
from tests.sae import toy
from tests.sae.toy import loss_of

D, N = 8, 32
SETTINGS = {"threshold": 0.1, "bandwidth": 0.1, "l0_warmup_steps": 0, "l0": 0.01}


def sample(rows=512, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})


def grads_of(sae, x, **hyper):
    params, stats = init(sae)
    return toy.grads_of(loss_of, sae, params, stats, x, **hyper)


def test_the_estimators_are_the_formulas():
    """Inside, outside and on the edges of the rectangle, which are outside."""
    theta, width = 0.5, 0.25
    p = jnp.asarray([-1.0, 0.375, 0.4, 0.5, 0.6, 0.625, 2.0])
    inside = np.array([0, 0, 1, 1, 1, 0, 0])
    g = jnp.arange(1.0, 8)
    at = jnp.full(7, theta)
    f, back = jax.vjp(lambda p, t: jump(p, t, width), p, at)
    np.testing.assert_array_equal(f, np.where(np.asarray(p) > theta, p, 0))
    dp, dtheta = back(g)
    np.testing.assert_array_equal(dp, np.where(np.asarray(p) > theta, g, 0))
    np.testing.assert_allclose(dtheta, -theta / width * inside * np.asarray(g))
    _, back = jax.vjp(lambda p, t: step_up(p, t, width), p, at)
    dp, dtheta = back(g)
    assert not dp.any()
    np.testing.assert_allclose(dtheta, -inside / width * np.asarray(g))


def test_the_count_estimates_a_density():
    """E[d count / d theta] is minus the density of p at theta: here a normal's."""
    p = jax.random.normal(jax.random.key(0), (1_000_000,))
    found = jax.grad(lambda t: step_up(p, jnp.broadcast_to(t, p.shape), 0.05).mean())(
        jnp.float32(1)
    )
    np.testing.assert_allclose(found, -np.exp(-0.5) / np.sqrt(2 * np.pi), rtol=0.03)


def test_the_loss_is_the_published_one():
    sae, x = JumpReLU(D, N, **SETTINGS), sample(64)
    params, stats = init(sae)
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    rows = x * p["scale"]
    scores = (rows - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    f = np.where(scores > np.exp(p["log_threshold"]), scores, 0)
    y = f @ p["W_dec"] + p["b_dec"]
    loss, out = loss_of(sae, params, stats, x)
    count = (f > 0).sum(1).mean()
    np.testing.assert_allclose(loss, ((rows - y) ** 2).sum(1).mean() + 0.01 * count, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], count, rtol=1e-6)
    np.testing.assert_allclose(sae.encode(params, x).values, f, atol=1e-5)
    values = np.asarray(sae.encode(params, x).values)
    assert ((values == 0) | (values > 0.0999)).all() and (values > 0).any()


def test_the_count_trains_thresholds_alone_and_raises_them():
    x, sae = sample(64), JumpReLU(D, N, **SETTINGS)
    with_count, without = grads_of(sae, x, l0=1.0), grads_of(sae, x, l0=0.0)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_array_equal(with_count[name], without[name], err_msg=name)
    pull = np.asarray(with_count["log_threshold"] - without["log_threshold"])
    assert (pull <= 1e-6).all() and (pull < -1e-3).any()


def test_a_target_that_is_met_pulls_no_more():
    x, plain = sample(64), JumpReLU(D, N, **SETTINGS)
    l0 = float(loss_of(plain, *init(plain), x)[1].metrics["l0"])
    met = JumpReLU(D, N, l0_target=l0, **SETTINGS)
    loss, out = loss_of(met, *init(met), x)
    np.testing.assert_allclose(loss, out.metrics["mse"], rtol=1e-6)
    for name, value in grads_of(met, x).items():
        np.testing.assert_allclose(value, grads_of(met, x, l0=0.0)[name], atol=1e-5)
    above = JumpReLU(D, N, l0_target=l0 / 2, **SETTINGS)
    np.testing.assert_allclose(loss_of(above, *init(above), x)[1].metrics["sparsity"], 1, rtol=1e-5)


def test_the_weight_of_the_count_warms_up():
    sae = JumpReLU(D, N, **{**SETTINGS, "l0_warmup_steps": 10})
    params, stats = init(sae)
    x = {"x": jnp.asarray(sample(64))}
    at = [sae.loss(params, stats, x, None, jnp.int32(s), sae.hyper())[0] for s in (0, 5, 10, 99)]
    np.testing.assert_allclose(np.diff(at), [(at[2] - at[0]) / 2] * 2 + [0], atol=1e-5)


def test_bad_values_are_refused():
    for name in ("bandwidth", "threshold", "l0_target"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            JumpReLU(D, N, **{name: 0.0})
    with pytest.raises(ValueError, match="l0=-1"):
        JumpReLU(D, N, l0=-1.0)
