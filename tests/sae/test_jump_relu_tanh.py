"""What the tanh variant of the JumpReLU card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import JumpReLUTanh
from tests.sae import toy

D, N = 8, 32
SETTINGS = {"sparsity": 0.3, "sparsity_warmup_steps": 0, "pre_activation": 0.01, "initial_l0": 8}


def sample(rows=512, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})


def loss_of(sae, params, stats, x, step=0, **hyper):
    hyper = {**sae.hyper(), "steps": 100, **hyper}
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(step), hyper)


def test_at_the_start_rows_have_norm_sqrt_d_and_latents_fire_alike():
    sae, x = JumpReLUTanh(D, N, **SETTINGS), sample()
    params, _ = init(sae)
    np.testing.assert_allclose(np.square(x * params["scale"]).sum(1).mean(), D, rtol=1e-5)
    fires = (np.asarray(sae.encode(params, x).values) > 0).mean(0)
    np.testing.assert_allclose(fires, 8 / N, atol=0.01)
    np.testing.assert_allclose(params["W_enc"], params["W_dec"] * D / N, rtol=1e-6)


def test_the_loss_is_the_published_one():
    sae, x = JumpReLUTanh(D, N, **SETTINGS), sample(64)
    params, stats = init(sae)
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    rows, theta = x * p["scale"], np.exp(p["log_threshold"])
    scores, norms = rows @ p["W_enc"].T + p["b_enc"], np.linalg.norm(p["W_dec"], axis=1)
    f = np.where(scores > theta, scores, 0)
    squares = ((rows - f @ p["W_dec"] - p["b_dec"]) ** 2).sum(1).mean()
    active = np.tanh(4 * f * norms).sum(1).mean()
    off = (np.maximum(theta - scores, 0) * norms).sum(1).mean()
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, squares + 0.3 * active + 0.01 * off, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)


def test_the_tanh_trains_encoder_decoder_and_thresholds():
    sae, x = JumpReLUTanh(D, N, **SETTINGS), sample(64)
    params, stats = init(sae)
    grads = [toy.grads_of(loss_of, sae, params, stats, x, sparsity=s) for s in (0.0, 1.0)]
    for name in ("W_enc", "W_dec", "b_enc", "log_threshold"):
        assert np.abs(grads[1][name] - grads[0][name]).max() > 1e-4, name
    assert (grads[1]["log_threshold"] - grads[0]["log_threshold"] <= 1e-6).all()


def test_the_last_term_lifts_a_latent_that_is_off():
    sae, x = JumpReLUTanh(D, N, **SETTINGS), sample(64)
    params, stats = init(sae)
    params["b_enc"] = params["b_enc"].at[0].set(-50)
    pull = {w: toy.grads_of(loss_of, sae, params, stats, x, pre_activation=w) for w in (0.0, 1.0)}
    norm = np.linalg.norm(params["W_dec"][0])
    np.testing.assert_allclose(pull[0.0]["b_enc"][0], 0)
    np.testing.assert_allclose(pull[1.0]["b_enc"][0], -norm, rtol=1e-5)


def test_the_weight_of_the_tanh_grows_over_the_whole_run_unless_said():
    x = sample(64)
    for steps, full in ((None, 100), (10, 10)):
        sae = JumpReLUTanh(D, N, **{**SETTINGS, "sparsity_warmup_steps": steps})
        at = [loss_of(sae, *init(sae), x, step=s)[0] for s in (0, full // 2, full)]
        np.testing.assert_allclose(np.diff(at), (at[2] - at[0]) / 2, rtol=1e-3)


def test_bad_values_are_refused():
    for name in ("bandwidth", "threshold", "tanh_scale"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            JumpReLUTanh(D, N, **{name: 0.0})
    with pytest.raises(ValueError, match="sparsity=-1"):
        JumpReLUTanh(D, N, sparsity=-1.0)
