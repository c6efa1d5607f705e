"""What Multi-TopK promises, checked against independent numpy and against TopK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import MultiTopK, TopK
from tests.sae import toy
from tests.sae.toy import loss_of

D, N, K = 8, 48, 3


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample(256))})


def reconstruction(params, x, k):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    rows = x * p["scale"]
    scores = (rows - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    cut = np.sort(scores, axis=1)[:, -k, None]
    f = np.where(scores >= cut, np.maximum(scores, 0), 0)
    return rows, f @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize(("k", "wide"), [(3, 4), (3, 40), (12, 4)])
def test_the_loss_is_the_published_one(k, wide):
    """Also where the wide sum would keep more than there are, or all."""
    sae, x = MultiTopK(D, N, k, wide=wide), sample()
    params, stats = init(sae)
    loss, out = loss_of(sae, params, stats, x)
    scale, mse = float(stats["mse_scale"]), []
    for kept in (k, min(wide * k, N)):
        rows, y = reconstruction(params, x, kept)
        mse.append(scale * ((rows - y) ** 2).mean())
    np.testing.assert_allclose(loss, mse[0] + mse[1] / 8, rtol=1e-5)
    np.testing.assert_allclose([out.metrics["mse"], out.metrics["mse_wide"]], mse, rtol=1e-5)
    np.testing.assert_allclose(out.reconstruction, reconstruction(params, x, k)[1], atol=1e-5)


def test_gradients_are_those_of_two_topk():
    """The encoder too learns from the wide sum; a smaller k of a sweep takes its own 4 k."""
    x, sae = sample(), MultiTopK(D, N, 5, aux_coefficient=0.0)
    params, stats = init(sae)
    found = toy.grads_of(loss_of, sae, params, stats, x, k=K)
    grads = []
    for k in (K, 4 * K):
        one = TopK(D, N, k, aux_coefficient=0.0)
        grads.append(toy.grads_of(loss_of, one, params, stats, x))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(
            found[name], grads[0][name] + grads[1][name] / 8, atol=1e-5, err_msg=name
        )


def test_inference_is_topk():
    x, sae = sample(), MultiTopK(D, N, K)
    params, _ = init(sae)
    np.testing.assert_array_equal(
        sae.encode(params, x).dense(N), TopK(D, N, K).encode(params, x).dense(N)
    )


def test_bad_values_are_refused():
    for changes, message in (({"wide": 1}, "wide=1"), ({"wide_weight": -1.0}, "wide_weight=-1")):
        with pytest.raises(ValueError, match=message):
            MultiTopK(D, N, **changes)
