"""What the Gated card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import Gated, JumpReLU
from saex.sae.gated import as_jump_relu
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N = 8, 32


def sample(rows=256, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def made(sae, moved=True):
    """(params, stats); moved: biases and scales that are not those of the start."""
    params, stats = sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})
    rng = np.random.default_rng(1)
    for name in ("r_mag", "b_mag", "b_enc") if moved else ():
        params[name] = jnp.asarray(rng.normal(size=N) * 0.3, jnp.float32)
    return params, stats


def loss_of(sae, params, stats, x, step=10**6, **hyper):
    hyper = {**sae.hyper(), **hyper}
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(step), hyper)


def paths(params, x):
    """In float64: (gates, f)."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    s = (x * p["scale"] - p["b_dec"]) @ p["W_enc"].T
    gates = s + p["b_enc"]
    return gates, np.where(gates > 0, np.maximum(np.exp(p["r_mag"]) * s + p["b_mag"], 0), 0)


def test_the_loss_is_the_published_one():
    sae, x = Gated(D, N, l1=0.1), sample(64)
    params, stats = made(sae)
    rows = x * np.float64(params["scale"])
    gates, f = paths(params, x)
    opened = np.maximum(gates, 0)
    by_f, by_gate = (
        ((rows - z @ np.asarray(params["W_dec"], np.float64) - np.asarray(params["b_dec"])) ** 2)
        .sum(1)
        .mean()
        for z in (f, opened)
    )
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, by_f + 0.1 * opened.sum(1).mean() + by_gate, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(sae.encode(params, x).values, f, atol=1e-5)
    assert ((opened > 0) & (f == 0)).any()  # an open gate without a magnitude is not active


def test_it_starts_as_a_relu():
    params, _ = made(Gated(D, N), moved=False)
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    x = sample(32)
    f = np.maximum((x * p["scale"] - p["b_dec"]) @ p["W_enc"].T, 0)
    np.testing.assert_allclose(Gated(D, N).encode(params, x).values, f, atol=1e-5)


def test_with_one_bias_and_no_scale_it_is_a_relu_of_its_gates():
    params, _ = made(Gated(D, N))
    params["r_mag"], params["b_mag"] = jnp.zeros((N,)), params["b_enc"]
    f = Gated(D, N).encode(params, sample()).values
    np.testing.assert_allclose(f, np.maximum(paths(params, sample())[0], 0), atol=1e-5)


def test_it_is_a_jump_relu():
    """Also where the threshold would be negative, which is then an ordinary ReLU."""
    params, _ = made(Gated(D, N))
    theta = params["b_mag"] - jnp.exp(params["r_mag"]) * params["b_enc"]
    assert (theta < 0).any() and (theta > 0).any()
    x, other = sample(128), JumpReLU(D, N)
    f = np.asarray(Gated(D, N).encode(params, x).values)
    np.testing.assert_allclose(other.encode(as_jump_relu(params), x).values, f, atol=1e-5)
    assert ((f > 0).sum(0) > 0).sum() > N / 2


def test_each_term_trains_what_it_should():
    """By the gradients of the whole, with terms switched off one by one."""
    sae, x = Gated(D, N), sample(64)
    params, stats = made(sae)
    whole, no_l1 = (toy.grads_of(loss_of, sae, params, stats, x, l1=l1) for l1 in (0.5, 0.0))
    for name in ("W_dec", "r_mag", "b_mag"):  # the penalty's gradient reaches gates alone
        np.testing.assert_array_equal(whole[name], no_l1[name], err_msg=name)
    gates, f = paths(params, x)
    rows = x * np.float64(params["scale"])
    W, b = (np.asarray(params[name], np.float64) for name in ("W_dec", "b_dec"))
    r = 2 * (f @ W + b - rows) / len(x)  # of the reconstruction alone: the other holds W_dec
    np.testing.assert_allclose(no_l1["W_dec"], f.T @ r, atol=1e-4)
    r_gate = 2 * (np.maximum(gates, 0) @ W + b - rows) / len(x)
    by_gate = ((r_gate @ W.T) * (gates > 0)).sum(0)  # and b_enc by the gates' path alone
    np.testing.assert_allclose(no_l1["b_enc"], by_gate, atol=1e-4)
    opened = (gates > 0).mean(0)
    np.testing.assert_allclose(whole["b_enc"] - no_l1["b_enc"], 0.5 * opened, atol=1e-4)


def test_the_penalty_warms_up():
    sae = Gated(D, N, l1=0.1, l1_warmup_steps=10)
    params, stats = made(sae)
    at = [loss_of(sae, params, stats, sample(64), step)[0] for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(np.diff(at), [(at[2] - at[0]) / 2] * 2 + [0], atol=1e-5)


def test_magnitudes_are_not_shrunk():
    """gamma = <x_hat, x> / ||x_hat||^2 stays near 1, where a ReLU's is above it (paper, 2.2)."""
    from saex.sae import ReLU

    mesh, gamma = make_mesh(MeshConfig()), {}
    for sae in (Gated(D, N, l1=0.3, l1_warmup_steps=0), ReLU(D, N, l1=0.3, l1_warmup_steps=0)):
        params, _ = toy.fit(sae, lambda i: sample(256, i) - 0.3, Optim(lr=5e-3), mesh, 300)
        x = sample(512, 10**5) - 0.3
        y = np.asarray(sae.decode(params, sae.encode(params, x)))
        gamma[type(sae)] = (y * x).sum() / (y**2).sum()
    assert abs(gamma[Gated] - 1) < 0.05 and gamma[ReLU] > gamma[Gated] + 0.05, gamma


def test_bad_values_are_refused():
    for changes, message in (({"n": 0}, "n=0"), ({"l1": -1.0}, "l1=-1")):
        with pytest.raises(ValueError, match=message):
            Gated(**{"d_in": D, "n": N, **changes})
