"""What the multi-layer card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import MultiLayer, TopK
from tests.sae import toy
from tests.sae.toy import loss_of

D, N, K, SITES = 8, 32, 4, 3


def sample(rows=256, seed=3):
    """[rows, sites * d]: each site louder than the one before, and elsewhere."""
    x = [toy.batch(toy.directions(24, D), rows, 3, seed + i) * 5**i + i for i in range(SITES)]
    return np.concatenate(x, axis=1)


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})


def through(params, x):
    """Rows of one site through the card's equations, float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    mean, sd = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True) + 1e-5
    z = ((x - mean) / sd * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    f = np.where(z >= np.sort(z, axis=1)[:, -K:][:, :1], np.maximum(z, 0), 0)
    return (f @ p["W_dec"] + p["b_dec"]) / p["scale"] * sd + mean


def test_the_loss_is_the_mean_fvu_of_the_sites():
    sae, x = MultiLayer(D, N, SITES, K), sample(64)
    params, stats = init(sae)
    y = np.concatenate([through(params, part) for part in np.split(x, SITES, axis=1)], axis=1)
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(out.reconstruction, y, rtol=1e-4, atol=1e-4)
    each = ((x - y) ** 2).reshape(64, SITES, D).sum((0, 2))
    each /= ((x - x.mean(0)) ** 2).reshape(64, SITES, D).sum((0, 2))
    np.testing.assert_allclose([out.metrics[f"fvu_{i}"] for i in range(SITES)], each, rtol=1e-4)
    np.testing.assert_allclose([loss, out.metrics["fvu"]], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(out.metrics["l0"], K, rtol=1e-6)


def test_any_site_can_be_encoded_alone():
    sae, x = MultiLayer(D, N, SITES, K), sample(32)
    params, _ = init(sae)
    for part in np.split(x, SITES, axis=1):
        y = sae.decode(params, sae.encode(params, part), part)
        np.testing.assert_allclose(y, through(params, part), rtol=1e-4, atol=1e-4)


def test_shift_and_size_of_a_row_pass_through():
    sae, x = MultiLayer(D, N, SITES, K), sample(32)[:, :D]
    params, _ = init(sae)
    change = np.linspace(1, 9, 32, dtype=np.float32)[:, None]
    moved = x * change + 3 * change
    one, two = sae.encode(params, x), sae.encode(params, moved)
    np.testing.assert_allclose(one.dense(N), two.dense(N), atol=1e-4)
    y = np.asarray(sae.decode(params, one, x)) * change + 3 * change
    np.testing.assert_allclose(sae.decode(params, two, moved), y, rtol=1e-3, atol=1e-3)


def test_a_site_that_is_standardised_already_is_topk():
    x = np.random.default_rng(0).normal(size=(64, D)).astype(np.float32)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)
    params, _ = init(MultiLayer(D, N, SITES, K))
    one, other = (sae.encode(params, x).dense(N) for sae in (MultiLayer(D, N, 1, K), TopK(D, N, K)))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_examples_count_not_rows():
    sae = MultiLayer(D, N, SITES, K, dead_after_tokens=SITES * 64 - 1)
    params, stats = init(sae)
    params["b_enc"] = params["b_enc"] - 100
    loss, out = loss_of(sae, params, stats, sample(64))
    assert float(out.metrics["dead"]) == 1 and np.isfinite(loss)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="sites=0"):
        MultiLayer(D, N, 0)
