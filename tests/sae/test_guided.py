"""What the card of guided SAEs promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import Guided, TopK
from saex.sae.guided import detect
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, N, K, C = 8, 32, 4, 3


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def labels(x):
    """Of three linear concepts, with some that are not known."""
    y = (x[:, :C] > 0.5).astype(np.float32)
    y[::7, 1] = -1
    return y


START = jax.jit(Guided(D, N, K).init)(jax.random.key(0), {"x": sample(256)})


def loss_of(sae, params, stats, x, label, **hyper):
    hyper, rows = {**sae.hyper(), **hyper}, {"x": jnp.asarray(x), "label": jnp.asarray(label)}
    return sae.loss(params, stats, rows, None, jnp.int32(0), hyper)


def entropy(params, x, y, positive=1.0):
    """Mean over rows of the sum over known labels, in float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    scores = ((x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])[:, :C]
    q = 1 / (1 + np.exp(-scores))
    each = np.where(y == 1, -positive * np.log(q), np.where(y == 0, -np.log(1 - q), 0))
    return each.sum(1).mean(), ((q > 0.5) == (y == 1))[y >= 0].mean(), q


@pytest.mark.parametrize("positive", [1.0, 3.0])
def test_the_loss_is_topk_plus_the_entropy_of_known_labels(positive):
    sae = Guided(D, N, K, concepts=C, label_coefficient=0.7, positive_weight=positive)
    (params, stats), x = START, sample()
    y = labels(x)
    loss, out = loss_of(sae, params, stats, x, y)
    expected, right, q = entropy(params, x, y, positive)
    plain = loss_of(TopK(D, N, K), params, stats, x, y)[0]
    np.testing.assert_allclose(loss - plain, 0.7 * expected, rtol=1e-4)
    np.testing.assert_allclose(out.metrics["label_accuracy"], right, rtol=1e-5)
    np.testing.assert_allclose(detect(sae, params, x), q, atol=1e-5)


def test_without_a_weight_it_is_topk_to_the_bit():
    (params, stats), x = START, sample()
    sae, plain = Guided(D, N, K, concepts=C, label_coefficient=0.0), TopK(D, N, K)
    found, expected = (toy.grads_of(loss_of, s, params, stats, x, labels(x)) for s in (sae, plain))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    one, other = (s.encode(params, x) for s in (sae, plain))
    np.testing.assert_array_equal(one.values, other.values)


def test_labels_train_their_own_latents_alone():
    (params, stats), x = START, sample()
    sae = Guided(D, N, K, concepts=C)
    with_labels, without = (
        toy.grads_of(loss_of, sae, params, stats, x, labels(x), label_coefficient=c)
        for c in (1.0, 0.0)
    )
    for name in ("W_enc", "b_enc"):
        moved = np.abs(with_labels[name] - without[name]).reshape(N, -1).max(1)
        assert (moved[:C] > 1e-4).all() and not moved[C:].any()
    np.testing.assert_array_equal(with_labels["W_dec"], without["W_dec"])


def test_a_column_of_one_label_a_row():
    (params, stats), x = START, sample()
    one = labels(x)[:, 0].astype(np.int8)
    sae = Guided(D, N, K)
    flat, column = (loss_of(sae, params, stats, x, y)[0] for y in (one, one[:, None]))
    assert float(flat) == float(column)
    with pytest.raises(ValueError, match="has 3 numbers a row, concepts=1"):
        loss_of(sae, params, stats, x, labels(x))


def test_concepts_are_learned_where_their_latents_are():

    def rows(i):
        return {"x": sample(256, i), "label": labels(sample(256, i))}

    x, how = sample(512, 10**5), (Optim(lr=3e-2), make_mesh(MeshConfig()), 150)
    guided = Guided(D, N, K, concepts=C, label_coefficient=3.0)
    params, history = toy.fit(guided, rows, *how)
    assert history[-1]["label_accuracy"] > 0.85 and history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    plain, _ = toy.fit(TopK(D, N, K), rows, *how)
    right, untaught = (
        ((x[:, :C] > 0.5) == (np.asarray(detect(guided, p, x)) > 0.5)).mean(0)
        for p in (params, plain)
    )
    assert right.min() > 0.8 and untaught.max() < 0.7, (right, untaught)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"concepts": 33}, "concepts=33"),
        ({"positive_weight": -1.0}, "positive_weight=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            Guided(**{"d_in": D, "n": N, "k": K, **changes})
