"""What the KronSAE card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import KronSAE
from saex.sharding import MeshConfig, check_divisible
from tests.sae import toy

D, HEADS, BASE, EXT, K = 8, 6, 2, 3, 5
N = HEADS * BASE * EXT


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def made(**changes):
    sae = KronSAE(**{"d_in": D, "n": N, "k": K, "base": BASE, "extension": EXT, **changes})
    params, stats = jax.jit(sae.init)(jax.random.key(0), {"x": sample(256)})
    rng = np.random.default_rng(1)
    params["b_enc"] = jnp.asarray(rng.normal(size=(HEADS, BASE + EXT)) * 0.1, jnp.float32)
    return sae, params, stats


def pairs(params, x, epsilon=1e-5):
    """z [b, heads, base, extension] in float64, pair by pair."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    u = np.einsum("bd,hed->bhe", x * p["scale"], p["W_enc"]) + p["b_enc"]
    z = np.zeros((len(x), HEADS, BASE, EXT))
    for c in range(HEADS):
        for i in range(BASE):
            for j in range(EXT):
                one, two = u[:, c, i], u[:, c, BASE + j]
                on = (one > 0) & (two > 0)
                z[on, c, i, j] = np.sqrt(one[on] * two[on] + epsilon) - np.sqrt(epsilon)
    return z


def top(z, k=K):
    flat = z.reshape(len(z), -1)
    return np.where(flat >= np.sort(flat, axis=1)[:, -k][:, None], flat, 0)


def loss_of(sae, params, stats, x):
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(0), sae.hyper())


def test_codes_are_the_largest_pairs():
    sae, params, _ = made()
    x = sample()
    f = np.asarray(sae.encode(params, x).dense(N))
    z = pairs(params, x)
    np.testing.assert_allclose(f, top(z), atol=1e-5)
    assert ((f > 0).sum(1) <= K).all() and (f > 0).any() and (z == 0).any()
    best = f.argmax(1)  # of a head: its largest base unit and its largest extension unit
    head, pair = np.divmod(best, BASE * EXT)
    of_head = z[np.arange(len(x)), head].reshape(len(x), -1)
    np.testing.assert_array_equal(of_head.argmax(1), pair)


def test_squares_of_a_head_are_of_rank_one_and_grow_with_the_encoder():
    sae, params, _ = made(epsilon=0.0, k=N)
    x = sample()
    z = np.asarray(sae.encode(params, x).dense(N)).reshape(len(x), HEADS, BASE, EXT)
    np.testing.assert_allclose(z, pairs(params, x, 0.0), atol=1e-5)
    one, two = (z[:, :, 0, a] * z[:, :, 1, b] for a, b in ((0, 1), (1, 0)))
    np.testing.assert_allclose(one, two, atol=1e-5)
    grown = {**params, "W_enc": 3 * params["W_enc"], "b_enc": 3 * params["b_enc"]}
    three = np.asarray(sae.encode(grown, x).dense(N)).reshape(z.shape)
    np.testing.assert_allclose(three, 3 * z, atol=1e-5)
    turned = {  # p by 2, q by 1/2: the same pairs
        name: params[name] * np.repeat([2, 0.5], (BASE, EXT)).reshape((1, -1) + (1,) * extra)
        for name, extra in (("W_enc", 1), ("b_enc", 0))
    }
    same = np.asarray(sae.encode({**params, **turned}, x).dense(N)).reshape(z.shape)
    np.testing.assert_allclose(same, z, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_gradients_are_those_of_the_dense_formulation(epsilon):
    """With AuxK, and with units that are exactly 0, where the root's slope is infinite."""
    sae, params, stats = made(epsilon=epsilon, dead_after_tokens=1000, k_aux=4)
    params["b_enc"] = params["b_enc"].at[0].set(-100.0)
    stats["since_fired"] = stats["since_fired"].at[::3].set(10**6)
    x = sample()

    def parts(params):
        rows = x * params["scale"]
        u = jnp.einsum("bd,hed->bhe", rows, params["W_enc"]) + params["b_enc"][None]
        p, q = u[:, :, :BASE, None], u[:, :, None, BASE:]
        on = (p > 0) & (q > 0)
        root = jnp.sqrt(jnp.where(on, p * q, 1.0) + epsilon) - epsilon**0.5
        return rows, jnp.where(on, root, 0).reshape(len(x), N)

    rows, z = (np.asarray(a, np.float64) for a in parts(params))
    chosen = top(z) > 0
    W, b = (np.asarray(params[name], np.float64) for name in ("W_dec", "b_dec"))
    e = rows - np.where(chosen, z, 0) @ W - b
    dead = (np.arange(N) % 3 == 0) & ~chosen.any(0)
    served = top(np.where(dead, z, 0), 4) > 0
    assert dead.any() and served.any()

    def dense(params):
        rows, z = parts(params)
        y = jnp.where(chosen, z, 0) @ params["W_dec"] + params["b_dec"][None]
        aux = ((jnp.where(served, z, 0) @ params["W_dec"] - e) ** 2).mean() / e.var(0).mean()
        return stats["mse_scale"] * ((rows - y) ** 2).mean() + aux / 32

    expected = jax.value_and_grad(dense)(params)
    loss, found = jax.value_and_grad(lambda p: loss_of(sae, p, stats, x)[0])(params)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert np.isfinite(found[name]).all() and np.abs(found[name]).max() > 0
        np.testing.assert_allclose(found[name], expected[1][name], atol=2e-5, err_msg=name)


def test_the_start():
    sae = KronSAE(D, N, K, BASE, EXT)
    params, _ = jax.jit(sae.init)(jax.random.key(0), {"x": sample(256)})
    W, rows = (np.asarray(params[name]) for name in ("W_enc", "W_dec"))
    for c, i, j in ((0, 0, 0), (2, 1, 0), (5, 1, 2)):
        row = W[c, i] + W[c, BASE + j]
        latent = c * BASE * EXT + i * EXT + j
        np.testing.assert_allclose(rows[latent], row / np.linalg.norm(row), atol=1e-5)
    count = sum(np.size(params[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert count == D * HEADS * (BASE + EXT) + HEADS * (BASE + EXT) + N * D + D


def test_units_see_centred_rows_at_first():
    x = sample(256) + 5
    params, _ = jax.jit(KronSAE(D, N, K, BASE, EXT).init)(jax.random.key(0), {"x": x})
    W, b, scale = (np.asarray(params[name]) for name in ("W_enc", "b_enc", "scale"))
    centred = np.einsum("bd,hed->bhe", (x - x.mean(0)) * scale, W)
    np.testing.assert_allclose(np.einsum("bd,hed->bhe", x * scale, W) + b, centred, atol=1e-5)
    published = KronSAE(D, N, K, BASE, EXT, b_dec_init="zeros")
    params, _ = jax.jit(published.init)(jax.random.key(0), {"x": x})
    assert not np.any(params["b_enc"]) and not np.any(params["b_dec"])


def test_bad_values_are_refused():
    for changes, message in (({"n": 37}, "n=37"), ({"k": 0}, "k=0"), ({"epsilon": -1.0}, "-1")):
        with pytest.raises(ValueError, match=message):
            KronSAE(**{"d_in": D, "n": N, "k": K, "base": BASE, "extension": EXT, **changes})
    with pytest.raises(ValueError, match=r"W_enc.*6"):  # heads are not cut
        check_divisible(KronSAE(D, N, K, BASE, EXT).specs(), MeshConfig(1, 4))
