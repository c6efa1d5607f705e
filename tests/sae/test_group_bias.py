"""What the card of group bias adaptation promises, checked against independent numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import GroupBias
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N = 8, 24
SAE = GroupBias(D, N, groups=3, most=0.3, least=0.03, every=2, rate_down=0.5, rate_up=0.25)


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


START = jax.jit(SAE.init)(jax.random.key(0), {"x": sample(256)})


def made():
    """(params, stats) with biases and amplitudes that are not those of the start."""
    params, stats = (dict(tree) for tree in START)
    rng = np.random.default_rng(1)
    params["b_enc"] = jnp.asarray(-rng.uniform(0, 0.6, N), jnp.float32).at[5].set(-0.999)
    params["amplitude"] = jnp.asarray(rng.uniform(0.5, 1.5, N), jnp.float32)
    params["W_dec"] = params["amplitude"][:, None] * params["W_enc"]
    return params, stats


def loss_of(sae, params, stats, x, step):
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(step), sae.hyper())


def pre(params, x):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    s = (x * p["scale"] - p["b_dec"]) @ p["W_enc"].T
    return s, s + p["b_enc"]


@pytest.mark.parametrize("relu", [False, True])
def test_the_loss_is_half_the_squares_and_decodes_by_the_encoder(relu):
    sae, (params, stats), x = dataclasses.replace(SAE, relu=relu), made(), sample()
    s, y = pre(params, x)
    f = np.where(y > 0, y if relu else s, 0)
    W, b = (np.asarray(params[name], np.float64) for name in ("W_enc", "b_dec"))
    x_hat = (f * np.asarray(params["amplitude"])) @ W + b
    rows = x * np.float64(params["scale"])
    loss, out = loss_of(sae, params, stats, x, 0)
    np.testing.assert_allclose(loss, 0.5 * ((rows - x_hat) ** 2).sum(1).mean(), rtol=1e-5)
    codes = sae.encode(params, x)
    np.testing.assert_allclose(codes.values, f, atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes) * params["scale"], x_hat, atol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_taken_from_rows_stays_their_mean(relu):
    """A b_dec that learns is a bias of all latents, and works against their own."""
    sae, rows = dataclasses.replace(SAE, relu=relu), [sample(64, i) for i in range(6)]
    params, _ = toy.fit(sae, lambda i: rows[i % 6], Optim(lr=0.1), make_mesh(MeshConfig()), 6)
    mean = rows[10**6 % 6].mean(0) * np.asarray(params["scale"])  # of the sample that init saw
    np.testing.assert_allclose(params["b_dec"], mean, atol=1e-6)


def test_amplitudes_stay_at_least_0():
    """Half the latents fire at the start, three times what a row needs: long steps go below 0."""
    rows, mesh = (lambda i: sample(64, i)), make_mesh(MeshConfig())
    params, _ = toy.fit(SAE, rows, Optim(lr=0.3, warmup=0.0, decay=0.0), mesh, 6)
    assert params["amplitude"].min() == 0 and params["amplitude"].max() > 0
    tied = params["amplitude"][:, None] * params["W_enc"]
    np.testing.assert_allclose(params["W_dec"], tied, atol=1e-6)


def test_biases_are_adapted_as_published():
    """After every second batch, by counts and peaks of both, each with the bias of its time."""
    params, stats = made()
    params["b_enc"] = params["b_enc"].at[jnp.array([7, 11])].set(-0.98)
    W = params["W_enc"].at[11].set(0.0)  # never fires
    params = {**params, "W_enc": W}
    one, two = sample(64, 4), sample(64, 5)
    out = loss_of(SAE, params, stats, one, 0)[1]
    np.testing.assert_array_equal(out.frozen["b_enc"], params["b_enc"])  # not due
    y = np.concatenate([pre(params, one)[1], pre(params, two)[1]])
    out = loss_of(SAE, params, out.stats, two, 1)[1]
    share, peak, b = (y > 0).mean(0), np.maximum(y.max(0), 0), np.asarray(params["b_enc"])
    targets, group = 0.3 * np.array([1, 0.1**0.5, 0.1]), np.arange(N) % 3
    expected, kept = b.copy(), []
    for i in range(N):
        others = peak[(group == group[i]) & (peak > 0)]
        if share[i] > targets[group[i]]:
            expected[i] = max(b[i] - 0.5 * peak[i], -1)
        elif share[i] == 0:
            expected[i] = min(b[i] + 0.25 * others.mean(), 0)
        else:
            kept.append(i)
    found = np.asarray(out.frozen["b_enc"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert kept and (found[kept] == b[kept]).all()
    assert found[11] > b[11] and (found < b).any() and ((found >= -1) & (found <= 0)).all()
    np.testing.assert_allclose(out.metrics["over_target"], (share > targets[group]).mean())
    assert int(out.stats["rows"]) == 0 and not out.stats["count"].any()


def test_latents_of_a_group_may_change_places():
    """A permutation within groups permutes the result; one across groups does not."""
    (params, stats), x = made(), sample()
    within = np.arange(N).reshape(-1, 3)[::-1].ravel()  # latent i is of group i mod 3
    found, rows = [], ("W_enc", "W_dec", "b_enc", "amplitude")
    for order in (np.arange(N), within, np.roll(np.arange(N), 1)):
        moved = {**params, **{name: params[name][order] for name in rows}}
        loss, out = loss_of(SAE, moved, stats, x, 1)  # an adaptation is due
        back = np.argsort(order)
        found.append((float(loss), np.asarray(out.frozen["b_enc"])[back]))
    np.testing.assert_allclose([loss for loss, _ in found], found[0][0], rtol=1e-6)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-6)
    assert np.abs(found[2][1] - found[0][1]).max() > 1e-3


def test_targets_are_a_ladder():
    np.testing.assert_allclose(GroupBias(D, N, 3, 0.5, 0.005).targets, (0.5, 0.05, 0.005))
    assert GroupBias(D, N, groups=1, most=0.1).targets == (0.1,)


def test_latents_come_to_fire_no_more_often_than_meant():
    """And b_enc stays in [-1, 0], W_dec stays amplitude * W_enc with unit rows."""
    sae = GroupBias(D, N, groups=2, most=0.2, least=0.05, every=5, rate_down=0.05)
    rows, mesh = (lambda i: sample(256, i)), make_mesh(MeshConfig())
    params, history = toy.fit(sae, rows, Optim(lr=2e-3), mesh, 300)
    fired = np.asarray(sae.encode(params, sample(2048, 10**5)).values) > 0
    share, target = fired.mean(0), np.array(sae.targets)[np.arange(N) % 2]
    assert (share > 1.25 * target + 0.01).mean() < 0.1, share / target
    assert history[0]["over_target"] > 0.7 and history[-1]["fvu"] < history[0]["fvu"]
    assert ((params["b_enc"] >= -1) & (params["b_enc"] <= 0)).all()
    np.testing.assert_allclose(np.linalg.norm(params["W_enc"], axis=1), 1, atol=1e-5)
    tied = params["amplitude"][:, None] * params["W_enc"]
    np.testing.assert_allclose(params["W_dec"], tied, atol=1e-6)


def test_bad_values_are_refused():
    for changes, message in (
        ({"groups": 0}, "groups=0"),
        ({"least": 0.9}, "least=0.9"),
        ({"every": 0}, "every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupBias(D, N, **changes)
