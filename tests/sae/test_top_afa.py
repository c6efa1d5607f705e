"""What the top-AFA card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import TopAFA
from saex.sae.losses import eps_lbo
from saex.sae.selection import norm_cut
from tests.sae import toy
from tests.sae.toy import loss_of

D, N = 8, 32


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample(256))})


def nearest(sizes, norm):
    """How many of a row's largest come nearest to a norm, by trying all numbers."""
    ordered = np.sort(np.maximum(sizes, 0))[::-1]
    reached = np.sqrt(np.cumsum(np.square(ordered, dtype=np.float64)))
    return 1 + int(np.argmin(np.abs(reached - norm)))


def expected(params, x):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    rows = x * p["scale"]
    scores = np.maximum((rows - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)
    sizes, f = scores * np.linalg.norm(p["W_dec"], axis=1), np.zeros_like(scores)
    for i, target in enumerate(np.linalg.norm(rows - p["b_dec"], axis=1)):
        kept = np.argsort(-sizes[i], kind="stable")[: nearest(sizes[i], target)]
        f[i, kept] = scores[i, kept]
    return rows, f, f @ p["W_dec"] + p["b_dec"]


def test_the_authors_worked_example():
    """Prefixes of norm 23.431, 30.806 and so on; to the dense norms all three latents are nearest.

    The authors keep two there: they never let all latents be kept.
    """
    a = np.array([[5.0, 4, 3], [1, 1, 1], [1, 10, 2]])
    W = np.array([[1.0, 2], [3, 4], [5, 6]])
    sizes = (a * np.linalg.norm(W, axis=1)).astype(np.float32)
    norms = np.linalg.norm(a @ W, axis=1).astype(np.float32)
    np.testing.assert_allclose(norms, [54.406, 15, 67.801], atol=1e-3)
    reached = np.sqrt(np.cumsum(np.sort(sizes**2, axis=1)[:, ::-1], axis=1))[:, :2]
    np.testing.assert_allclose(reached, [[23.431, 30.806], [7.810, 9.274], [50, 52.383]], atol=1e-3)
    for target, expected in ((norms, 3), (reached[:, 1], 2), (reached[:, 0] / 2, 1)):
        cut = np.asarray(norm_cut(jnp.asarray(sizes), jnp.asarray(target)))
        np.testing.assert_array_equal((sizes >= cut[:, None]).sum(1), expected)


def test_the_cut_is_the_nearest_crossing():
    """Below the largest value, in the middle, and beyond all of them."""
    sizes = np.random.default_rng(0).normal(size=(60, 20)).astype(np.float32)
    norms = np.linspace(0, 6, 60).astype(np.float32)
    kept = sizes >= np.asarray(norm_cut(jnp.asarray(sizes), jnp.asarray(norms)))[:, None]
    counts = (kept & (sizes > 0)).sum(1)
    assert list(counts) == [min(nearest(s, t), (s > 0).sum()) for s, t in zip(sizes, norms)]
    assert counts[0] == 1 and counts[-1] == (sizes[-1] > 0).sum()
    double = norm_cut(jnp.asarray(2 * sizes), jnp.asarray(2 * norms))
    np.testing.assert_array_equal(kept, 2 * sizes >= np.asarray(double)[:, None])


def test_the_loss_is_the_published_one():
    sae, x = TopAFA(D, N, afa=0.1), sample()
    params, stats = init(sae)
    rows, f, y = expected(params, x)
    gap = np.square(np.linalg.norm(f, axis=1) - np.linalg.norm(rows, axis=1)).mean()
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)
    squares = ((rows - y) ** 2).sum(1).mean()
    np.testing.assert_allclose(loss, squares + 0.1 * D * gap, rtol=1e-5)
    np.testing.assert_allclose(sae.encode(params, x).values, f, atol=1e-5)


def test_the_norm_loss_pulls_codes_to_the_norm_of_the_row():
    sae, x = TopAFA(D, N), sample()
    params, stats = init(sae)
    f = expected(params, x)[1]
    short = np.linalg.norm(f, axis=1).mean() < np.linalg.norm(x * params["scale"], axis=1).mean()
    grads = [toy.grads_of(loss_of, sae, params, stats, x, afa=a)["b_enc"] for a in (0.0, 1.0)]
    pull = float(np.sum(grads[1] - grads[0]))
    assert pull < 0 if short else pull > 0


def test_eps_lbo_is_below_the_largest_cosine_and_0_for_orthogonal_rows():
    rng = np.random.default_rng(1)
    W = toy.directions(12, D)
    f = np.maximum(rng.normal(size=(50, 12)), 0).astype(np.float32)
    cosines = np.abs(W @ W.T - np.eye(12)).max()
    for i in range(50):
        one = jnp.asarray(f[i : i + 1])
        bound = float(eps_lbo(one @ W, (one**2).sum(1), None, 12))
        square, gap = np.sum(f[i] ** 2), np.sum((f[i] @ W) ** 2)
        np.testing.assert_allclose(bound, abs(gap - square) / (11 * square), rtol=1e-3)
        assert bound <= cosines
    Q = jnp.asarray(np.linalg.qr(rng.normal(size=(D, D)))[0], jnp.float32)
    f = jnp.asarray(f[:, :D])
    np.testing.assert_allclose(eps_lbo(f @ Q, (f**2).sum(1), None, D), 0, atol=1e-6)


def test_bad_values_are_refused():
    for changes, message in (({"afa": -1.0}, "afa=-1"), ({"n": 1}, "n=1")):
        with pytest.raises(ValueError, match=message):
            TopAFA(**{"d_in": D, "n": N, **changes})
