"""What the Matryoshka card promises of nested k (MSAE), checked against independent numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import MSAE, TopK
from tests.sae import toy
from tests.sae.toy import loss_of

D, N, K = 8, 32, 3


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


START = jax.jit(TopK(D, N, K).init)(jax.random.key(0), {"x": sample(256)})


def made(**changes):
    sae = MSAE(**{"d_in": D, "n": N, "k": K, "levels": (1, 2, 5), **changes})
    return sae, *(dict(tree) for tree in START)


def codes_of(params, x, k):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    scores = (x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    return np.where(scores >= np.sort(scores, axis=1)[:, -k][:, None], np.maximum(scores, 0), 0)


def squares(params, x, ks):
    W, b = (np.asarray(params[name], np.float64) for name in ("W_dec", "b_dec"))
    rows = x * np.float64(params["scale"])
    return np.array([((codes_of(params, x, k) @ W + b - rows) ** 2).mean() for k in ks])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("weights", ["uniform", "reverse"])
def test_the_loss_is_the_weighted_mean_over_levels(whole, weights):
    sae, params, stats = made(whole=whole, weights=weights)
    x = sample()
    ks = [3, 6, 15] + [N] * whole
    r = np.ones(len(ks)) if weights == "uniform" else np.arange(len(ks), 0, -1)
    each = squares(params, x, ks) * float(stats["mse_scale"])
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, (r * each).sum() / r.sum(), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (codes_of(params, x, K) > 0).sum(1).mean())
    assert (each[1:] != each[:-1]).all() and ("fvu_whole" in out.metrics) == whole


def test_gradients_are_those_of_the_dense_formulation():
    sae, params, stats = made()
    x = sample()
    kept = [codes_of(params, x, k) > 0 for k in (3, 6, 15, N)]

    def dense(params):
        rows = x * params["scale"]
        p = (rows - params["b_dec"][None]) @ params["W_enc"].T + params["b_enc"][None]
        ys = (jnp.where(on, p, 0) @ params["W_dec"] + params["b_dec"][None] for on in kept)
        return stats["mse_scale"] * sum(((rows - y) ** 2).mean() for y in ys) / 4

    expected = jax.grad(dense)(params)
    found = toy.grads_of(loss_of, sae, params, stats, x)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def test_one_level_is_topk():
    sae, params, stats = made(levels=(1,), whole=False)
    x, plain = sample(), TopK(D, N, K)
    loss, out = loss_of(sae, params, stats, x)
    expected = loss_of(plain, params, stats, x)[1]
    np.testing.assert_allclose(loss, expected.metrics["mse"], rtol=1e-6)
    np.testing.assert_allclose(out.reconstruction, expected.reconstruction, atol=1e-6)


def test_any_k_may_be_read():
    sae, params, _ = made()
    x = sample()
    few, many = (dataclasses.replace(sae, k=k, levels=(1,)) for k in (2, 9))
    f, g = (np.asarray(s.encode(params, x).dense(N)) for s in (few, many))
    np.testing.assert_allclose(f, codes_of(params, x, 2), atol=1e-5)
    np.testing.assert_allclose(g, codes_of(params, x, 9), atol=1e-5)
    np.testing.assert_allclose(np.where(f > 0, g, 0), f, atol=1e-6)


def test_a_sweep_varies_k():
    sae, params, stats = made(whole=False)
    x = sample()
    loss, _ = loss_of(sae, params, stats, x, k=jnp.float32(2))
    each = squares(params, x, [2, 4, 10]) * float(stats["mse_scale"])
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-5)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"levels": ()}, "levels"),
        ({"levels": (2, 2)}, "ascending"),
        ({"levels": (1, 20)}, "takes 60 of n=32"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**changes)
