"""What the AdaptiveK card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import AdaptiveK, TopK, probe
from tests.sae import toy

D, N = 8, 64
SETTINGS = {"k_min": 2, "k_max": 12, "l1": 0.1}


def sample(rows=64, seed=3):
    x = toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3
    return toy.columns(AdaptiveK(D, N, **SETTINGS), x, seed)


def init(sae):
    return sae.init(jax.random.key(0), jax.tree.map(jnp.asarray, sample(256)))


def loss_of(sae, params, stats, batch, step=0, **hyper):
    hyper = {**sae.hyper(), "steps": 100, **hyper}
    batch = jax.tree.map(jnp.asarray, batch)
    return sae.loss(params, stats, batch, None, jnp.int32(step), hyper)


def grads_of(sae, params, stats, batch, step, **hyper):
    return toy.grads_of(loss_of, sae, params, stats, batch, step, **hyper)


def test_the_map_is_the_published_one():
    found = AdaptiveK(D, 512).latents_of(jnp.arange(-1.0, 12))
    table = [34, 34, 45, 63, 89, 126, 170, 214, 251, 277, 295, 306, 306]
    np.testing.assert_array_equal(found, table)


def test_each_row_keeps_its_own_k():
    sae, batch = AdaptiveK(D, N, **SETTINGS), sample()
    params, stats = init(sae)
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    x = batch["x"] * p["scale"]
    s = np.clip(batch["x"] * p["probe_scale"] @ p["probe_w"] + p["probe_b"], 0, 10)
    ks = np.round(2 + 10 / (1 + np.exp(-6 * (s / 10 - 0.5)))).astype(int)
    assert len(set(ks)) > 3
    scores, f = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], np.zeros((64, N))
    for i, k in enumerate(ks):
        kept = np.argsort(-scores[i])[:k]
        f[i, kept] = np.maximum(scores[i, kept], 0)
    np.testing.assert_allclose(sae.encode(params, batch["x"]).dense(N), f, atol=1e-5)
    y = f @ p["W_dec"] + p["b_dec"]
    mse = float(stats["mse_scale"]) * ((x - y) ** 2).mean()
    l1 = f.sum(1).mean() / np.linalg.norm(x, axis=1).mean()
    loss, out = loss_of(sae, params, stats, batch)
    np.testing.assert_allclose(loss, mse + 0.1 * l1, rtol=1e-5)
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)


def test_with_one_k_it_is_topk():
    x = sample()["x"]
    sae = AdaptiveK(D, N, k_min=5, k_max=5)
    params, _ = init(sae)
    shared = {name: params[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "scale")}
    np.testing.assert_array_equal(
        sae.encode(params, x).dense(N), TopK(D, N, 5).encode(shared, x).dense(N)
    )


def test_the_probe_is_the_ridge_solution_and_starts_where_it_ended():
    sae = AdaptiveK(D, N, **SETTINGS)
    params, stats = init(sae)
    made = sample(256)
    x, y = made["x"].astype(np.float64) * float(params["probe_scale"]), made["complexity"]
    w, lam = np.asarray(params["probe_w"], np.float64), float(stats["penalty"]) * 256
    xc, yc = x - x.mean(0), y - y.mean()
    assert min(abs(lam / np.array(probe.PENALTIES) - 1)) < 1e-5
    np.testing.assert_allclose(xc.T @ (xc @ w - yc) + lam * w, 0, atol=2e-3)
    np.testing.assert_allclose(params["probe_b"], y.mean() - x.mean(0) @ w, rtol=1e-4)
    grads = grads_of(sae, params, stats, made, 95)
    np.testing.assert_allclose(grads["probe_w"], 0, atol=1e-4)
    np.testing.assert_allclose(grads["probe_b"], 0, atol=1e-4)


def test_validation_takes_the_penalty_that_predicts_best():
    """Noise alone wants the largest; an exact line the smallest."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(100, 30)), jnp.float32)
    noise, line = rng.normal(size=100), x @ np.arange(30.0)
    assert float(probe.fit(x, jnp.asarray(noise, jnp.float32))[2]) == 1000
    assert float(probe.fit(x, jnp.asarray(line, jnp.float32))[2]) == np.float32(0.01)


def test_only_its_own_loss_moves_the_probe_and_only_late():
    sae, batch = AdaptiveK(D, N, **SETTINGS), sample()
    params, stats = init(sae)
    params["probe_w"] = params["probe_w"] + 0.1
    early, late = (grads_of(sae, params, stats, batch, step) for step in (89, 90))
    assert not np.any(early["probe_w"]) and not np.any(early["probe_b"])
    assert np.abs(late["probe_w"]).max() > 1e-3
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_array_equal(early[name], late[name], err_msg=name)


def test_the_pull_weakens_while_the_error_falls():
    assert float(probe.next_pull(0.2, 0.9, 1.0)) == pytest.approx(0.16)
    assert float(probe.next_pull(0.2, 0.96, 1.0)) == pytest.approx(0.24)
    assert float(probe.next_pull(0.011, 0.1, 1.0)) == pytest.approx(0.01)
    assert float(probe.next_pull(0.45, 1.0, 1.0)) == pytest.approx(0.5)


def test_the_column_may_have_another_scale():
    batch = sample()
    other = {**batch, "complexity": 3 + 2 * batch["complexity"]}
    found = []
    for data, scale in ((batch, {}), (other, {"lowest": 3.0, "highest": 23.0})):
        sae = AdaptiveK(D, N, **SETTINGS, **scale)
        found.append(sae.init(jax.random.key(0), jax.tree.map(jnp.asarray, data))[0]["probe_w"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k_min": 9, "k_max": 8}, "k_min=9, k_max=8"),
        ({"k_max": 65}, "k_max=65, n=64"),
        ({"lowest": 10.0}, "lowest=10.0"),
        ({"tune_from": 2.0}, "tune_from=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveK(D, N, **{**SETTINGS, **changes})
