"""What the gradient SAE card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import GradientTopK, TopK
from saex.sharding import MeshConfig, make_mesh
from tests.sae import toy

D, N, K = 8, 32, 4


def sample(rows=512, seed=3):
    x = 2 * toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3
    return {"x": x, "gradient": 1e-3 * np.random.default_rng(seed).normal(size=x.shape)}


def arrays(batch):
    return {name: jnp.asarray(rows, jnp.float32) for name, rows in batch.items()}


def init(sae):
    return sae.init(jax.random.key(0), arrays(sample()))


def loss_of(sae, params, stats, batch, **hyper):
    hyper = {**sae.hyper(), **hyper}
    return sae.loss(params, stats, arrays(batch), None, jnp.int32(0), hyper)


def scores(params, batch):
    """(relu of pre-activations, |g W_dec^T|) in float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    z = np.maximum((batch["x"] * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)
    return z, np.abs(batch["gradient"] @ p["W_dec"].T) * p["gradient_scale"]


@pytest.mark.parametrize("beta", [1.0, 1e6])
def test_the_choice_is_by_effect_and_the_value_is_not(beta):
    sae, batch = GradientTopK(D, N, K, beta=beta), sample(64)
    params, stats = init(sae)
    z, effect = scores(params, batch)
    s = z * (1 + beta * effect)
    f = np.where(s >= np.sort(s, axis=1)[:, [-K]], z, 0)
    codes = sae.encode_by_effect(params, (batch["x"], batch["gradient"].astype(np.float32)))
    np.testing.assert_allclose(codes.dense(N), f, atol=1e-5)
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    np.testing.assert_allclose(loss_of(sae, params, stats, batch)[1].reconstruction, y, atol=1e-5)
    plain = np.where(z >= np.sort(z, axis=1)[:, [-K]], z, 0)
    moved = ((f > 0) != (plain > 0)).any(axis=1).mean()
    assert moved > 0.3
    np.testing.assert_allclose(loss_of(sae, params, stats, batch)[1].metrics["moved"], moved)
    np.testing.assert_allclose(sae.encode(params, batch["x"]).dense(N), plain, atol=1e-5)


def test_the_choice_by_effect_is_the_same_on_a_mesh():
    sae, batch = GradientTopK(D, N, K), arrays(sample(64))
    params, _ = init(sae)
    given = batch["x"], batch["gradient"]
    alone = sae.encode_by_effect(params, given).dense(N)
    with jax.set_mesh(make_mesh(MeshConfig(2, 4))):
        there = jax.device_get(sae.encode_by_effect(params, given))
    np.testing.assert_allclose(there.dense(N), alone, atol=1e-6)


def test_effects_are_1_on_average_at_the_start():
    params, _ = init(GradientTopK(D, N, K))
    np.testing.assert_allclose(scores(params, sample())[1].mean(), 1, rtol=1e-5)


def test_without_beta_or_gradient_it_is_topk():
    batch, (params, stats) = sample(64), init(GradientTopK(D, N, K))
    topk = {k: v for k, v in params.items() if k != "gradient_scale"}
    expected = jax.grad(lambda p: loss_of(TopK(D, N, K), p, stats, batch)[0])(topk)
    none = {**batch, "gradient": 0 * batch["gradient"]}
    for beta, given in ((0.0, batch), (1.0, none)):
        sae = GradientTopK(D, N, K, beta=beta)
        found = toy.grads_of(loss_of, sae, params, stats, given)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_sign_and_units_of_the_gradient_do_not_matter():
    sae, batch = GradientTopK(D, N, K), sample(64)
    params, stats = init(sae)
    y = loss_of(sae, params, stats, batch)[1].reconstruction
    turned = {**batch, "gradient": -batch["gradient"]}
    np.testing.assert_array_equal(loss_of(sae, params, stats, turned)[1].reconstruction, y)
    larger = {**batch, "gradient": 8 * batch["gradient"]}
    same = loss_of(sae, params, stats, larger, beta=1 / 8)[1].reconstruction
    np.testing.assert_array_equal(same, y)


def test_no_gradient_goes_through_the_choice():
    sae, batch = GradientTopK(D, N, K), arrays(sample(64))
    params, stats = init(sae)
    hyper = {name: jnp.float32(value) for name, value in sae.hyper().items()}

    def loss(g, beta):
        rows = {**batch, "gradient": g}
        return sae.loss(params, stats, rows, None, jnp.int32(0), {**hyper, "beta": beta})[0]

    for found in jax.grad(loss, (0, 1))(batch["gradient"], jnp.float32(1)):
        assert not np.asarray(found).any()


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="beta=-1"):
        GradientTopK(D, N, K, beta=-1.0)
