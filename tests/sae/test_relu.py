"""What the ReLU + L1 card (April 2024) promises."""

import jax
import jax.numpy as jnp
import numpy as np

from saex.sae import ReLU
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N = 8, 32


def sample(rows=256, seed=0):
    return toy.batch(toy.directions(16, D), rows, 3, seed)


def loss_of(sae, params, stats, x, step=10**6):
    hyper = {k: jnp.float32(v) for k, v in sae.hyper().items()}
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(step), hyper)


def test_the_loss_is_the_published_sum():
    sae, x = ReLU(D, N, l1=0.3), sample()
    params, stats = sae.init(jax.random.key(0), {"x": jnp.asarray(x)})
    params = {**params, "b_enc": params["b_enc"] + 0.01, "b_dec": params["b_dec"] + 0.1}
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    scaled = x * p["scale"]
    f = np.maximum(scaled @ p["W_enc"].T + p["b_enc"], 0)
    y = f @ p["W_dec"] + p["b_dec"]
    expected = np.mean(np.sum((scaled - y) ** 2, 1))
    expected += 0.3 * np.mean(f @ np.linalg.norm(p["W_dec"], axis=1))
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], np.mean(np.sum(f > 0, 1)), rtol=1e-6)


def test_latents_see_centred_rows_at_first():
    x = sample() + 5
    params, _ = ReLU(D, N).init(jax.random.key(0), {"x": jnp.asarray(x)})
    centred = (x - x.mean(0)) * params["scale"]
    p = np.asarray(x * params["scale"] @ params["W_enc"].T) + np.asarray(params["b_enc"])
    np.testing.assert_allclose(p, centred @ params["W_enc"].T, atol=1e-5)
    published, _ = ReLU(D, N, b_dec_init="zeros").init(jax.random.key(0), {"x": jnp.asarray(x)})
    assert not np.any(published["b_enc"]) and not np.any(published["b_dec"])


def test_rescaling_a_latent_changes_no_term():
    sae, x = ReLU(D, N, l1=0.3), sample()
    params, stats = sae.init(jax.random.key(0), {"x": jnp.asarray(x)})
    c = np.exp(np.random.default_rng(0).normal(size=N)).astype(np.float32)
    scaled = {
        **params,
        "W_dec": params["W_dec"] * c[:, None],
        "W_enc": params["W_enc"] / c[:, None],
        "b_enc": params["b_enc"] / c,
    }
    one, two = loss_of(sae, params, stats, x)[1], loss_of(sae, scaled, stats, x)[1]
    for name in ("mse", "l1", "l0"):
        np.testing.assert_allclose(one.metrics[name], two.metrics[name], rtol=1e-4)


def test_the_coefficient_warms_up():
    sae, x = ReLU(D, N, l1=1.0, l1_warmup_steps=10), sample()
    params, stats = sae.init(jax.random.key(0), {"x": jnp.asarray(x)})
    full, out = loss_of(sae, params, stats, x)
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0)):
        loss, _ = loss_of(sae, params, stats, x, step)
        np.testing.assert_allclose(loss, out.metrics["mse"] + share * out.metrics["l1"], rtol=1e-5)
    assert float(full) > float(out.metrics["mse"])


def test_a_huge_penalty_leaves_the_mean_and_a_tiny_one_reconstructs():
    def final(l1):
        sae = ReLU(D, N, l1=l1, l1_warmup_steps=1)
        _, history = toy.fit(
            sae, lambda i: sample(256, i), Optim(lr=1e-2), make_mesh(MeshConfig()), 300
        )
        return history[-1]

    most, least = final(30.0), final(1e-4)
    assert most["l0"] < 0.5 and most["fvu"] > 0.9
    assert least["l0"] > 3 and least["fvu"] < 0.05


def test_a_zero_decoder_row_does_not_make_the_gradient_nan():
    sae, x = ReLU(D, N, l1=0.3), sample()
    params, stats = sae.init(jax.random.key(0), {"x": jnp.asarray(x)})
    params = {**params, "W_dec": params["W_dec"].at[3].set(0.0)}
    grads = toy.grads_of(loss_of, sae, params, stats, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
