"""What the Feature Choice card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, FeatureChoice, zipf
from saex.sae.selection import batch_cut, column_cuts
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N, K = 8, 32, 4


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample(256))})


def loss_of(sae, params, stats, x, step, key=None):
    hyper = {**sae.hyper(), "steps": 100}
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, key, jnp.int32(step), hyper)


def scores(params, x):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    return np.maximum((x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)


def test_each_latent_keeps_its_largest():
    values = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    totals = np.array([0, 1, 5, 40, 12, 3])
    cuts = np.asarray(column_cuts(jnp.asarray(values), jnp.asarray(totals, jnp.float32)))
    for column, total, cut in zip(values.T, totals, cuts):
        kept = (column >= cut) & (column > 0)
        assert kept.sum() == min(total, (column > 0).sum())
        assert not kept.any() or column[kept].min() >= column[~kept].max()


def test_budgets_are_whole_follow_the_law_and_sum_to_the_total():
    law = jnp.asarray(0.3 * (np.arange(1, 41) + 2.0) ** -1.1, jnp.float32)
    means = np.asarray(law / law.sum()) * 100
    drawn = [np.asarray(zipf.budgets(law, 100, s, 64)) for s in np.linspace(0.01, 0.99, 50)]
    for m in drawn:
        assert m.sum() == 100 and (m == np.round(m)).all()
        assert (np.abs(m - means) < 1 + 1e-3).all()
    np.testing.assert_allclose(np.mean(drawn, axis=0), means, atol=0.06)
    np.testing.assert_array_equal(zipf.budgets(jnp.full((8,), 0.2), 24, 0.5, 64), np.full(8, 3))
    assert zipf.budgets(law, 100, 0.5, 6).max() == 6


def test_latents_choose_by_the_law_late_in_the_run():
    """Budgets of the law, thresholds at the chosen ones' ends; early it is BatchTopK."""
    sae, x = FeatureChoice(D, N, K), sample()
    params, stats = init(sae)
    stats["law"] = jnp.asarray(0.5 * (np.arange(1, N + 1) + 1.0) ** -0.9, jnp.float32)
    p, m = scores(params, x), np.asarray(zipf.budgets(stats["law"], K * 64, 0.5, 64)).astype(int)
    ends = np.array([np.sort(column)[-n] if n else np.inf for column, n in zip(p.T, m)])
    f = np.where(p >= ends, p, 0)
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    out = loss_of(sae, params, stats, x, 80)[1]
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)
    chosen = np.where(np.isfinite(ends), ends, params["threshold"])
    np.testing.assert_allclose(out.frozen["threshold"], chosen, rtol=1e-5)
    other = BatchTopK(D, N, K, capacity=N)
    same = other.loss(*init(other), {"x": jnp.asarray(x)}, None, jnp.int32(0), other.hyper())[1]
    early = loss_of(sae, params, stats, x, 79)[1]
    np.testing.assert_allclose(early.reconstruction, same.reconstruction, atol=1e-5)


def test_three_ways_of_allocating_one_budget():
    """By rows, by latents, by both: the last is never beaten, the first two are one, transposed."""
    p = np.random.default_rng(0).permutation(64 * N).reshape(64, N).astype(np.float32) + 1
    each, M = 64 * K // N, 64 * K  # pairs of a latent, of all
    by_latent = p >= np.asarray(column_cuts(jnp.asarray(p), jnp.full((N,), float(each))))[None]
    by_both = p >= float(batch_cut(M, jnp.asarray(p)))
    by_row = p >= np.sort(p, axis=1)[:, -K][:, None]
    assert (by_latent.sum(0) == each).all() and by_both.sum() == M
    for latent, rows in enumerate(np.asarray(jax.lax.top_k(jnp.asarray(p.T), each)[1])):
        np.testing.assert_array_equal(np.flatnonzero(by_latent[:, latent]), np.sort(rows))
    by_latent, by_both, by_row = (p[chosen].sum() for chosen in (by_latent, by_both, by_row))
    assert by_both > max(by_latent, by_row)


def test_a_budget_of_every_row_is_a_relu():
    sae, x = FeatureChoice(D, N, N, choice_from=0.0), sample()
    params, stats = init(sae)
    stats["law"] = jnp.ones((N,))
    f = scores(params, x)
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    np.testing.assert_allclose(loss_of(sae, params, stats, x, 5)[1].reconstruction, y, atol=1e-5)
    stats["law"] = jnp.ones((N,)).at[3].set(0.0)
    f[:, 3] = 0  # a budget of none is never active
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    np.testing.assert_allclose(loss_of(sae, params, stats, x, 5)[1].reconstruction, y, atol=1e-5)


def test_latents_may_change_places_with_their_budgets():
    sae, x, order = FeatureChoice(D, N, K, choice_from=0.0), sample(), np.arange(N)[::-1].copy()
    params, stats = init(sae)
    stats["law"] = jnp.asarray(np.where(np.arange(N) < N // 2, 6, 2) / 64, jnp.float32)
    moved = {**params}
    for name in ("W_enc", "W_dec", "b_enc"):
        moved[name] = params[name][order]
    other = {**stats, "law": stats["law"][order]}
    one, two = loss_of(sae, params, stats, x, 5)[1], loss_of(sae, moved, other, x, 5)[1]
    np.testing.assert_allclose(two.reconstruction, one.reconstruction, atol=1e-5)
    thresholds = (np.asarray(out.frozen["threshold"]) for out in (one, two))
    np.testing.assert_allclose(next(thresholds)[order], next(thresholds), rtol=1e-5)


def test_rows_may_change_places():
    sae, x = FeatureChoice(D, N, K, choice_from=0.0), sample(32)
    params, stats = init(sae)
    y, turned = (loss_of(sae, params, stats, rows, 5)[1].reconstruction for rows in (x, x[::-1]))
    np.testing.assert_allclose(turned, y[::-1], atol=1e-6)


def test_thresholds_keep_about_k_and_leave_no_latent_out():
    sae = FeatureChoice(D, N, K, choice_from=0.5, density_rows=2000, law_every=5)
    mesh = make_mesh(MeshConfig())
    params, _ = toy.fit(sae, lambda i: sample(256, i), Optim(lr=1e-3), mesh, 80)
    x = sample(2048, 10**5)
    f, p = np.asarray(sae.encode(params, x).values), scores(params, x)
    np.testing.assert_allclose(f, np.where(p > params["threshold"], p, 0), atol=1e-4)
    assert abs((f > 0).sum(1).mean() / K - 1) < 0.15
    assert ((f > 0).sum(0) > 0).all()


def test_bad_values_are_refused():
    for changes, message in (
        ({"choice_from": 1.5}, "choice_from=1.5"),
        ({"threshold_rate": 0.0}, "threshold_rate=0.0"),
        ({"law_every": 0}, "law_every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureChoice(D, N, K, **changes)
