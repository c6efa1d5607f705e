"""What the crosscoder card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchCrosscoder, Crosscoder, ReLU, sites
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

WIDTHS, N, K = (6, 4), 32, 4
D = sum(WIDTHS)
BOTH = [Crosscoder(D, N, WIDTHS, l1=0.3), BatchCrosscoder(D, N, WIDTHS, K)]


def sample(rows=512, seed=3):
    x = toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3
    return x * np.repeat([1.0, 7.0], WIDTHS).astype(np.float32)  # one site is louder


def init(sae, rows=None):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample() if rows is None else rows)})


def shaken(sae):
    """(params with uneven decoder norms, stats)."""
    params, stats = init(sae)
    factor = np.random.default_rng(1).uniform(0.2, 2, (N, 2)).astype(np.float32)
    bias = np.random.default_rng(2).normal(size=N).astype(np.float32) * 0.1
    W_dec = params["W_dec"] * np.repeat(factor, WIDTHS, axis=1)
    return {**params, "W_dec": W_dec, "b_enc": jnp.asarray(bias)}, stats


def loss_of(sae, params, stats, x):
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(10**6), sae.hyper())


def parts(params, x):
    """(scaled rows, pre-activations, N_i), in float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    x = x * p["scale"]
    first, second = np.split(p["W_dec"], [WIDTHS[0]], axis=1)
    norms = np.linalg.norm(first, axis=1) + np.linalg.norm(second, axis=1)
    return x, x @ p["W_enc"].T + p["b_enc"], norms, p


def test_the_loss_is_the_cards():
    sae, x = BOTH[0], sample(64)
    params, stats = shaken(sae)
    rows, pre, norms, p = parts(params, x)
    f = np.maximum(pre, 0)
    y = f @ p["W_dec"] + p["b_dec"]
    expected = ((rows - y) ** 2).sum(1).mean() + 0.3 * (f @ norms).mean()
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    decoded = np.asarray(sae.decode(params, sae.encode(params, x)))
    np.testing.assert_allclose(decoded * p["scale"], y, atol=1e-5)
    for i, part in enumerate((slice(0, 6), slice(6, None))):
        left = ((rows - y)[:, part] ** 2).sum() / ((rows - rows.mean(0))[:, part] ** 2).sum()
        np.testing.assert_allclose(out.metrics[f"fvu_{i}"], left, rtol=1e-5)


def test_every_site_weighs_the_same():
    params, _ = init(BOTH[0])
    for part in np.split(sample() * np.asarray(params["scale"]), [WIDTHS[0]], axis=1):
        np.testing.assert_allclose((part**2).sum(1).mean(), 1, rtol=1e-5)


def test_latents_see_centred_rows_at_first():
    sae, x = BatchCrosscoder(D, N, WIDTHS, K, b_dec_init="mean"), sample() + 5
    params, _ = init(sae, x)
    scale, W = np.asarray(params["scale"]), np.asarray(params["W_enc"])
    p = x * scale @ W.T + np.asarray(params["b_enc"])
    np.testing.assert_allclose(p, (x - x.mean(0)) * scale @ W.T, atol=1e-4)
    kept = p > np.asarray(params["threshold"])  # which are those of these very rows
    assert kept.sum() == pytest.approx(K * len(x), rel=1e-3)


def test_one_site_is_relu():
    for changes in ({}, {"widths": (D,)}):
        one, other = Crosscoder(D, N, **changes), ReLU(D, N)
        found = [loss_of(sae, *init(sae), sample(64))[0] for sae in (one, other)]
        np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("capacity", [N, K, 0])
def test_a_batch_keeps_what_adds_most(capacity):
    """b k entries by p N, also where there is too little room; the code is p."""
    sae, x = BatchCrosscoder(D, N, WIDTHS, K, capacity=capacity), sample(64)
    params, stats = shaken(sae)
    _, pre, norms, p = parts(params, x)
    s = np.maximum(pre * norms, 0)
    cut = np.sort(s, axis=None)[-64 * K]
    y = np.where(s >= cut, pre, 0) @ p["W_dec"] + p["b_dec"]
    _, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-4)
    np.testing.assert_allclose(out.metrics["l0"], K, rtol=1e-6)
    moved = stats["cut"] + 0.01 * (cut - stats["cut"])
    np.testing.assert_allclose(out.frozen["threshold"], moved / norms, rtol=1e-4)


@pytest.mark.parametrize("sae", BOTH, ids=["relu", "batch"])
def test_a_latent_may_be_written_otherwise(sae):
    """Encoder by c, decoder by 1/c: loss and reconstruction stay, at inference too."""
    params, stats = shaken(sae)
    c = np.random.default_rng(3).uniform(0.5, 2, N).astype(np.float32)
    other = {**params, "W_enc": params["W_enc"] * c[:, None], "b_enc": params["b_enc"] * c}
    other["W_dec"] = params["W_dec"] / c[:, None]
    if "threshold" in params:
        other["threshold"] = params["threshold"] * c
    x = sample(64)
    (one, _), (two, _) = (loss_of(sae, p, stats, x) for p in (params, other))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    y = [sae.decode(p, sae.encode(p, x)) for p in (params, other)]
    np.testing.assert_allclose(*y, atol=1e-3)


def test_inference_keeps_about_k():
    sae = BatchCrosscoder(D, N, WIDTHS, K, threshold_rate=0.05)
    params, _ = toy.fit(sae, lambda i: sample(256, i), Optim(lr=1e-3), make_mesh(MeshConfig()), 100)
    x = sample(1024, 10**5)
    f = np.asarray(sae.encode(params, x).values)
    assert abs((f > 0).sum(1).mean() / K - 1) < 0.05


def test_where_latents_live():
    W = np.zeros((4, D), np.float32)
    W[0, 0], W[1, 7], W[2, [0, 7]], W[3, [0, 7]] = 2, 3, 1, (1, 4)
    params = {"W_dec": jnp.asarray(W)}
    relative = sites.relative_norms(params, WIDTHS)
    np.testing.assert_allclose(relative, [[1, 0], [0, 1], [1, 1], [0.25, 1]])
    delta = np.asarray(sites.difference(params, WIDTHS))
    np.testing.assert_allclose(delta, [0, 1, 0.5, 0.875])
    np.testing.assert_allclose(sites.difference(params, WIDTHS, 1, 0), 1 - delta)


def test_the_same_site_twice_shares_every_latent():

    def twice(i):
        return np.tile(toy.batch(toy.directions(24, 6), 256, 3, i), (1, 2))

    sae = Crosscoder(12, N, (6, 6))

    def tile(p):
        return {**p, **{k: jnp.tile(p[k][:, :6], (1, 2)) for k in ("W_enc", "W_dec")}}

    params, _ = toy.fit(sae, twice, Optim(lr=1e-2), make_mesh(MeshConfig()), 30, change=tile)
    np.testing.assert_allclose(sites.difference(params, (6, 6)), 0.5, atol=1e-5)
    np.testing.assert_allclose(params["W_dec"][:, :6], params["W_dec"][:, 6:], atol=1e-5)


def test_bad_widths_are_refused():
    for widths in ((4, 4), (0, D), (-1, D + 1)):
        with pytest.raises(ValueError, match="widths"):
            Crosscoder(D, N, widths)
