"""What the Matryoshka card promises of nested prefixes, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, Matryoshka
from saex.sae.matryoshka import first_latents
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N, K = 8, 32, 4
FRACTIONS = (1 / 16, 3 / 16, 1 / 4, 1 / 2)
ENDS = (2, 8, 16, 32)


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


START = jax.jit(Matryoshka(D, N, K).init)(jax.random.key(0), {"x": sample(512)})


def made(**changes):
    """(a dictionary, params, stats)."""
    sae = Matryoshka(**{"d_in": D, "n": N, "k": K, "fractions": FRACTIONS, **changes})
    return sae, *(dict(tree) for tree in START)


def loss_of(sae, params, stats, x, key=None):
    rows = {"x": jnp.asarray(x)}
    return sae.loss(params, stats, rows, key, jnp.int32(0), sae.hyper())


def codes_of(params, x, k=K):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    scores = np.maximum((x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)
    return np.where(scores >= np.sort(scores, axis=None)[-len(x) * k], scores, 0)


def prefix_squares(params, x, ends):
    """Mean squares of each prefix' residual, in float64, each made from scratch."""
    f, rows = codes_of(params, x), x * np.float64(params["scale"])
    W, b = (np.asarray(params[name], np.float64) for name in ("W_dec", "b_dec"))
    return [((f[:, :m] @ W[:m] + b - rows) ** 2).mean() for m in ends]


@pytest.mark.parametrize("capacity", [N, 0])
def test_the_loss_is_the_mean_over_prefixes(capacity):
    sae, params, stats = made(capacity=capacity)
    x = sample()
    loss, out = loss_of(sae, params, stats, x)
    squares = prefix_squares(params, x, ENDS)
    np.testing.assert_allclose(loss, np.mean(squares) * stats["mse_scale"], rtol=1e-5)
    spread = (x - x.mean(0)).var(0).mean() * np.float64(params["scale"]) ** 2
    for g in range(3):
        np.testing.assert_allclose(out.metrics[f"fvu_{g + 1}"], squares[g] / spread, rtol=1e-4)
    f = codes_of(params, x)
    assert not out.metrics["fallback"]
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)


def test_one_group_is_batch_topk():
    x, (sae, params, stats) = sample(), made(fractions=(1.0,))
    plain = BatchTopK(D, N, K)
    (one, out), (other, expected) = (loss_of(s, params, stats, x) for s in (sae, plain))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(out.reconstruction, expected.reconstruction, atol=1e-6)
    for name in ("W_enc", "W_dec", "b_enc"):
        found, wanted = (toy.grads_of(loss_of, s, params, stats, x)[name] for s in (sae, plain))
        np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=name)


def test_a_latent_feels_the_prefixes_that_hold_it_and_no_others():
    """The gradient of W_dec in float64, prefix by prefix."""
    sae, params, stats = made()
    x = sample()
    f, rows = codes_of(params, x), x * np.float64(params["scale"])
    W, b = (np.asarray(params[name], np.float64) for name in ("W_dec", "b_dec"))
    expected = np.zeros((N, D))
    for m in ENDS:
        r = f[:, :m] @ W[:m] + b - rows
        expected[:m] += 2 * f[:, :m].T @ r / r.size / len(ENDS)
    found = toy.grads_of(loss_of, sae, params, stats, x)["W_dec"]
    np.testing.assert_allclose(found, expected * float(stats["mse_scale"]), atol=1e-5)


def test_latents_of_a_group_may_change_places():
    sae, params, stats = made()
    order = np.arange(N)
    order[8:16] = order[8:16][::-1]
    turned = {n: params[n][order] for n in ("W_enc", "W_dec", "b_enc")}
    x = sample()
    one, other = (loss_of(sae, p, stats, x)[0] for p in (params, {**params, **turned}))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    order[[0, 20]] = order[[20, 0]]  # across groups it matters
    turned = {n: params[n][order] for n in ("W_enc", "W_dec", "b_enc")}
    assert abs(float(loss_of(sae, {**params, **turned}, stats, x)[0] - one)) > 1e-4


def test_drawn_prefixes_are_of_the_key_and_prefer_short_ones():
    sae, params, stats = made(sampled=4)
    keys = jax.random.split(jax.random.key(0), 400)
    ends = np.asarray(jax.jit(jax.vmap(sae._ends))(keys))
    assert (ends[:, -1] == N).all() and (np.diff(ends, axis=1) > 0).all() and ends.min() >= 1
    lengths = np.arange(1, N)
    chance = np.sqrt(lengths) - np.sqrt(lengths - 1)
    two = Matryoshka(D, N, K, sampled=2)
    one = np.asarray(jax.jit(jax.vmap(two._ends))(keys))[:, 0]
    mean = (lengths * chance).sum() / chance.sum()
    assert abs(one.mean() - mean) < 4 * one.std() / 20
    x, key = sample(), jax.random.key(3)
    found = loss_of(sae, params, stats, x, key)[0]
    squares = prefix_squares(params, x, np.asarray(sae._ends(key)))
    np.testing.assert_allclose(found, np.mean(squares) * stats["mse_scale"], rtol=1e-5)


def test_drawn_prefixes_are_the_same_on_a_mesh():
    sae, losses = Matryoshka(D, N, K, sampled=4), []
    for config in (MeshConfig(), MeshConfig(2, 4)):
        _, history = toy.fit(sae, lambda i: sample(64, i), Optim(lr=1e-2), make_mesh(config), 3)
        losses.append([m["loss"] for m in history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_prefix_alone_is_a_dictionary():
    sae, params, _ = made()
    small, cut = first_latents(sae, params, 8)
    x = sample()
    whole = np.asarray(sae.encode(params, x).values)
    np.testing.assert_allclose(small.encode(cut, x).values, whole[:, :8], atol=1e-6)
    assert (small.n, small.d_in) == (8, D)
    with pytest.raises(ValueError, match="m=33"):
        first_latents(sae, params, 33)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"fractions": (0.5, 0.4)}, "sum up to 1"),
        ({"fractions": (0.001, 0.999)}, "groups of"),
        ({"capacity": 2}, "capacity=2"),
        ({"sampled": 33}, "sampled=33"),
    ):
        with pytest.raises(ValueError, match=message):
            Matryoshka(**{"d_in": D, "n": N, "k": K, **changes})
    assert Matryoshka(D, 100, 4).prefixes == (3, 9, 21, 46, 100)
    assert Matryoshka(D, 20, 2, sampled=10).groups == 10  # its fractions are not used
