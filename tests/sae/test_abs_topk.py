"""What the AbsTopK card promises, checked against independent numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import AbsTopK, TopK
from saex.sharding import MeshConfig, make_mesh, shardings
from tests.sae import toy

D, N, K = 16, 64, 4


def rows(seed, count=64):
    """Signed sparse sums: both poles of each direction occur."""
    truth = toy.directions(24, D)
    return toy.batch(truth, count, 2, seed) - toy.batch(truth, count, 2, seed + 10**6) + 0.2


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(rows(1, 256))})


def scores(params, x):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    return (x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]


def test_codes_are_the_k_largest_by_size_with_their_signs():
    sae, x = AbsTopK(D, N, K), rows(77)
    params, _ = init(sae)
    p, f = scores(params, x), np.asarray(sae.encode(params, x).dense(N))
    assert ((f != 0).sum(1) == K).all() and (f < 0).any() and (f > 0).any()
    cut = np.sort(np.abs(p), axis=1)[:, -K, None]
    np.testing.assert_allclose(f, np.where(np.abs(p) >= cut, p, 0), atol=1e-5)


def test_codes_are_the_nearest_of_k_entries():
    """The minimiser of ||p - z|| over all supports of K latents, by trying them all."""
    sae, x = AbsTopK(4, 8, 3), rows(5, 6)[:, :4]
    params, _ = sae.init(jax.random.key(1), {"x": jnp.asarray(rows(1, 64)[:, :4])})
    p, f = scores(params, x), np.asarray(sae.encode(params, x).dense(8))
    tried = [((p**2).sum(1) - (p[:, s] ** 2).sum(1)) for s in itertools.combinations(range(8), 3)]
    np.testing.assert_allclose(((p - f) ** 2).sum(1), np.min(tried, axis=0), rtol=1e-4)


def test_the_loss_and_its_gradients_are_those_of_the_dense_formula():
    sae, x = AbsTopK(D, N, K), jnp.asarray(rows(6))
    params, stats = init(sae)

    def dense(params):
        rows = x * params["scale"]
        p = (rows - params["b_dec"][None]) @ params["W_enc"].T + params["b_enc"][None]
        cut = jnp.sort(jnp.abs(p), axis=1)[:, -K, None]
        y = jnp.where(jnp.abs(p) >= cut, p, 0) @ params["W_dec"] + params["b_dec"][None]
        return 0.5 * jnp.mean(jnp.sum(jnp.square(rows - y), axis=1))

    def ours(params):
        return sae.loss(params, stats, {"x": x}, None, jnp.int32(0), sae.hyper())[0]

    np.testing.assert_allclose(ours(params), dense(params), rtol=1e-5)
    found, expected = jax.grad(ours)(params), jax.grad(dense)(params)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def test_without_biases_it_is_odd_and_a_latent_turned_round_turns_its_code():
    sae, x = AbsTopK(D, N, K), rows(78)
    params = {k: v * 0 if k.startswith("b_") else v for k, v in init(sae)[0].items()}
    plus, minus = (np.asarray(sae.encode(params, sign * x).dense(N)) for sign in (1, -1))
    np.testing.assert_allclose(minus, -plus, atol=1e-6)
    signs = np.where(np.arange(N) % 3 == 0, -1.0, 1.0).astype(np.float32)
    turned = {**params, **{w: params[w] * signs[:, None] for w in ("W_enc", "W_dec")}}
    codes = sae.encode(turned, x)
    np.testing.assert_allclose(codes.dense(N), plus * signs, atol=1e-6)
    np.testing.assert_allclose(
        sae.decode(turned, codes), sae.decode(params, sae.encode(params, x)), atol=1e-5
    )


def test_where_all_scores_are_positive_it_is_topk():
    x, sae = rows(79), AbsTopK(D, N, K)
    params = init(sae)[0]
    params = {**params, "b_enc": params["b_enc"] + 10}
    ours, other = sae.encode(params, x), TopK(D, N, K).encode(params, x)
    np.testing.assert_allclose(ours.dense(N), other.dense(N), atol=1e-6)


@pytest.mark.parametrize("k", [K, 12])
def test_codes_are_the_same_on_eight_devices(k):
    """Also where a device has fewer latents (8) than are to be chosen."""
    sae, x = AbsTopK(D, N, k), rows(80, 32)
    mesh, params = make_mesh(MeshConfig(data=1, model=8)), init(sae)[0]
    where = shardings(sae.specs()["params"], mesh)
    split = {name: jax.device_put(value, where[name]) for name, value in params.items()}
    codes, whole = jax.device_get(sae.encode(split, x)), sae.encode(params, x)
    assert codes.values.shape == whole.values.shape == (32, k)
    np.testing.assert_allclose(codes.dense(N), whole.dense(N), atol=1e-6)


def test_too_large_a_k_is_refused():
    with pytest.raises(ValueError, match="k=9 active of n=8"):
        AbsTopK(4, 8, 9)
