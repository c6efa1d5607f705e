"""What the BatchTopK card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, TopK, selection
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy
from tests.sae.toy import loss_of

D, N, K = 8, 32, 4


def sample(rows=512, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})


def scores(params, x):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    return np.maximum((x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)


@pytest.mark.parametrize("capacity", [N, 4, 0])
def test_a_batch_keeps_its_largest(capacity):
    """Sparsely or, where there is too little room, densely: the card's equations."""
    sae, x = BatchTopK(D, N, K, capacity=capacity), sample(64)
    params, stats = init(sae)
    p = scores(params, x)
    cut = np.sort(p, axis=None)[-64 * K]
    f = np.where(p >= cut, p, 0)
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    _, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], K, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["cut"], cut, rtol=1e-5)
    too_few = capacity == 4  # none to spare for what lies just below the cut
    assert (p > selection.BELOW_LAST * cut).sum() > 64 * K
    np.testing.assert_allclose(out.stats["last_cut"], cut, rtol=1e-5)
    _, again = loss_of(sae, params, out.stats, x)
    assert float(again.metrics["fallback"]) == too_few
    assert float(again.metrics["fallbacks"]) == int(again.stats["fallbacks"]) >= too_few
    moved = 0.99 * params["threshold"] + 0.01 * cut
    np.testing.assert_allclose(out.frozen["threshold"], moved, rtol=1e-5)


def test_one_row_is_topk():
    x = sample(1)
    one = loss_of(BatchTopK(D, N, K), *init(BatchTopK(D, N, K)), x)[1]
    other = loss_of(TopK(D, N, K), *init(TopK(D, N, K)), x)[1]
    np.testing.assert_allclose(one.reconstruction, other.reconstruction, atol=1e-6)


def test_rows_may_change_places_and_the_batch_may_be_doubled():
    sae, x = BatchTopK(D, N, K), sample(32)
    y = np.asarray(loss_of(sae, *init(sae), x)[1].reconstruction)
    turned = loss_of(sae, *init(sae), x[::-1])[1].reconstruction
    twice = loss_of(sae, *init(sae), np.concatenate([x, x]))[1].reconstruction
    np.testing.assert_allclose(turned, y[::-1], atol=1e-6)
    np.testing.assert_allclose(twice, np.concatenate([y, y]), atol=1e-6)


def test_inference_keeps_about_k_and_is_the_threshold():
    sae = BatchTopK(D, N, K, threshold_rate=0.05)
    params, _ = toy.fit(sae, lambda i: sample(256, i), Optim(lr=1e-3), make_mesh(MeshConfig()), 100)
    x = sample(1024, 10**5)
    f = np.asarray(sae.encode(params, x).values)
    p = scores(params, x)
    np.testing.assert_allclose(f, np.where(p > params["threshold"], p, 0), atol=1e-4)
    assert abs((f > 0).sum(1).mean() / K - 1) < 0.05 and params["threshold"] > 0


def test_a_batch_with_nothing_above_0_leaves_the_threshold():
    sae = BatchTopK(D, N, K)
    params, stats = init(sae)
    params["b_enc"] = params["b_enc"] - 100
    out = loss_of(sae, params, stats, sample(16))[1]
    assert float(out.metrics["l0"]) == 0
    np.testing.assert_array_equal(out.frozen["threshold"], params["threshold"])


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"capacity": 2}, "capacity=2"),
        ({"threshold_rate": 0.0}, "threshold_rate=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchTopK(**{"d_in": D, "n": N, "k": K, **changes})
