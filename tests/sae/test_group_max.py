"""GroupMax against independent numpy, also where groups and devices do not line up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import GroupMax
from saex.sharding import MeshConfig, make_mesh, shardings
from tests.sae import toy

D = 8


def sample(rows=32, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def made(n, k):
    sae = GroupMax(D, n, k)
    return sae, sae.init(jax.random.key(0), {"x": jnp.asarray(sample(256))})


def expected(params, x, k):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    scores = (x * p["scale"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    groups = scores.reshape(len(x), k, -1)
    f = np.where(groups == groups.max(2, keepdims=True), np.maximum(groups, 0), 0)
    return f.reshape(len(x), -1)


@pytest.mark.parametrize(("n", "k"), [(48, 4), (48, 48), (48, 1)])
def test_codes_are_the_largest_of_each_group(n, k):
    sae, (params, stats) = made(n, k)
    x = sample()
    f = expected(params, x, k)
    np.testing.assert_allclose(sae.encode(params, x).dense(n), f, atol=1e-5)
    _, out = sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(0), sae.hyper())
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(48, 16), (48, 4), (48, 6), (48, 1)])
def test_codes_are_the_same_on_eight_devices(n, k):
    """Whole groups on a device, parts of one, and parts of two."""
    sae, (params, _) = made(n, k)
    x, mesh = sample(), make_mesh(MeshConfig(data=1, model=8))
    where = shardings(sae.specs()["params"], mesh)
    split = {name: jax.device_put(value, where[name]) for name, value in params.items()}
    codes = jax.device_get(sae.encode(split, x))
    assert codes.values.shape == (32, k)
    np.testing.assert_allclose(codes.dense(n), sae.encode(params, x).dense(n), atol=1e-6)


def test_of_equals_the_lowest_latent_wins():
    sae, (params, _) = made(48, 6)
    params = {**params, "W_enc": params["W_enc"] * 0, "b_enc": params["b_enc"] + 1}
    firsts = np.arange(0, 48, 8)
    mesh = make_mesh(MeshConfig(data=1, model=8))
    where = shardings(sae.specs()["params"], mesh)
    split = {name: jax.device_put(value, where[name]) for name, value in params.items()}
    for given in (params, split):
        codes = sae.encode(given, sample(2))
        np.testing.assert_array_equal(np.sort(codes.indices, axis=1), np.stack([firsts, firsts]))


def test_a_k_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="k=5 groups of n=48"):
        GroupMax(D, 48, 5)
