"""What the matching pursuit card promises, checked against independent numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import MatchingPursuit
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N, K = 8, 32, 6


def sample(rows=512, seed=3):
    return 2 * toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})


def loss_of(sae, params, stats, x, step=0, **hyper):
    hyper = {**sae.hyper(), **hyper}
    batch = {"x": jnp.asarray(x)}
    return sae.loss(params, stats, batch, jax.random.key(1), jnp.int32(step), hyper)


def pursuit(params, x, steps):
    """(codes [b, n], residuals, one after each step), in scaled units."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    r, f, left = x * p["scale"] - p["b_dec"], np.zeros((len(x), N)), []
    rows = np.arange(len(x))
    for _ in range(steps):
        c = r @ p["W_dec"].T
        j = c.argmax(1)
        v = np.maximum(c[rows, j], 0)
        f[rows, j] += v
        r = r - v[:, None] * p["W_dec"][j]
        left.append(r)
    return f, left


def test_codes_and_loss_are_the_pursuits():
    sae, x = MatchingPursuit(D, N, K), sample(64)
    params, stats = init(sae)
    f, left = pursuit(params, x, K)
    scale = float(params["scale"])
    codes = sae.encode(params, x)
    np.testing.assert_allclose(codes.dense(N) * scale, f, atol=1e-5)
    assert (f > 0).sum(1).min() < K  # some atom was taken twice, and stands once
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(loss, stats["mse_scale"] * np.square(left[-1]).mean(), rtol=1e-4)
    np.testing.assert_allclose(out.reconstruction, x * scale - left[-1], atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes) * scale, x * scale - left[-1], atol=1e-5)
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)


def test_training_may_stop_where_inference_does():
    x = sample(64)
    params, stats = init(MatchingPursuit(D, N, K))
    l0 = {}
    for stop in (False, True):
        sae = MatchingPursuit(D, N, K, tolerance=0.3, stop_training=stop)
        out = loss_of(sae, params, stats, x)[1]
        l0[stop] = float(out.metrics["l0"])
        y = np.asarray(sae.decode(params, sae.encode(params, x))) * float(params["scale"])
        assert (np.abs(out.reconstruction - y).max() < 1e-5) == stop
    assert l0[True] < l0[False]
    left = x * float(params["scale"]) - y
    taken = np.asarray(sae.encode(params, x).dense(N) > 0).sum(1)
    assert (np.linalg.norm(left, axis=1)[taken < K - 1] <= 0.3 + 1e-6).all()


def test_what_is_left_is_orthogonal_and_never_grows():
    params, _ = init(MatchingPursuit(D, N, K))
    x, D_ = sample(64), np.asarray(params["W_dec"])
    before = x * float(params["scale"]) - np.asarray(params["b_dec"])
    last, earlier = np.inf, np.zeros((64, N))
    for k in range(1, K + 1):
        codes = MatchingPursuit(D, N, k).encode(params, x)
        r = before - np.asarray(codes.dense(N)) @ D_ * float(params["scale"])
        norms = np.linalg.norm(r, axis=1)
        assert (norms <= last + 1e-6).all()
        taken = np.asarray(codes.dense(N)) - earlier
        atom = D_[taken.argmax(1)]
        moved = taken.max(1) > 1e-4
        assert (np.abs((r * atom).sum(1)[moved]) < 1e-5).all()
        assert (taken > -1e-6).all() and ((taken > 1e-5).sum(1) <= 1).all()
        last, earlier = norms, np.asarray(codes.dense(N))


def test_orthonormal_atoms_are_topk():
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    params, _ = init(MatchingPursuit(D, D, 3))
    params["W_dec"] = jnp.asarray(turn, jnp.float32)
    x = sample(64)
    p = (x * float(params["scale"]) - np.asarray(params["b_dec"])) @ turn.T
    f = np.where(p >= np.sort(p, axis=1)[:, -3:-2], np.maximum(p, 0), 0)
    found = MatchingPursuit(D, D, 3).encode(params, x).dense(D) * params["scale"]
    np.testing.assert_allclose(found, f, atol=1e-5)


def test_gradients_are_those_of_the_unrolled_steps():
    """Against automatic differentiation of the dense pursuit, its choices held constant."""
    sae, x = MatchingPursuit(D, N, K), sample(32)
    params, stats = init(sae)

    def unrolled(W, b):
        r = x * params["scale"] - b[None]
        for _ in range(K):
            c = r @ W.T
            chosen = jax.nn.one_hot(jax.lax.stop_gradient(c).argmax(1), N)
            v = jax.nn.relu(jnp.sum(c * chosen, axis=1, keepdims=True))
            r = r - v * (chosen @ W)
        return stats["mse_scale"] * jnp.mean(jnp.square(r))

    expected = jax.grad(unrolled, (0, 1))(params["W_dec"], params["b_dec"])
    found = toy.grads_of(loss_of, sae, params, stats, x)
    np.testing.assert_allclose(found["W_dec"], expected[0], atol=1e-5)
    np.testing.assert_allclose(found["b_dec"], expected[1], atol=1e-5)


def test_sparsity_is_chosen_at_inference():
    """By steps, or row by row until little is left."""
    params, _ = init(MatchingPursuit(D, N, K))
    x, scale = sample(64), float(params["scale"])
    more = dataclasses.replace(MatchingPursuit(D, N, K), k=N, tolerance=0.2)
    codes = np.asarray(more.encode(params, x).dense(N)) * scale
    r = x * scale - np.asarray(params["b_dec"]) - codes @ np.asarray(params["W_dec"])
    assert np.linalg.norm(r, axis=1).max() <= 0.2 + 1e-5
    steps = [
        [np.linalg.norm(a) for a in row] for row in np.swapaxes(pursuit(params, x, N)[1], 0, 1)
    ]
    needed = [next(i for i, left in enumerate(row) if left <= 0.2) + 1 for row in steps]
    assert len(set(needed)) > 2
    l0 = (codes > 0).sum(1)
    assert (l0 <= needed).all() and l0.max() > l0.min()


def test_members_may_take_fewer_steps():
    sae, x = MatchingPursuit(D, N, K), sample(32)
    params, stats = init(sae)
    fewer = loss_of(sae, params, stats, x, k=jnp.float32(2))[0]
    alone = loss_of(MatchingPursuit(D, N, 2), params, stats, x)[0]
    np.testing.assert_allclose(fewer, alone, rtol=1e-6)


def test_atoms_are_withheld_at_first_and_equally_on_every_mesh():
    sae = MatchingPursuit(D, N, K, atom_dropout=0.75, dropout_steps=5)
    params, stats = init(sae)
    plain = loss_of(MatchingPursuit(D, N, K), params, stats, sample(64))[0]
    assert loss_of(sae, params, stats, sample(64))[0] > 1.5 * plain
    np.testing.assert_allclose(loss_of(sae, params, stats, sample(64), 5)[0], plain, rtol=1e-6)
    runs = []
    for mesh in (MeshConfig(), MeshConfig(1, 2)):
        made = functools.partial(sample, 64)
        runs.append(toy.fit(sae, made, Optim(lr=1e-2), make_mesh(mesh), 4)[1])
    np.testing.assert_allclose(*[[m["loss"] for m in r] for r in runs], rtol=1e-5)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"atom_dropout": 1.0}, "atom_dropout=1.0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MatchingPursuit(**{"d_in": D, "n": N, "k": K, **changes})
