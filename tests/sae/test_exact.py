"""Candidates, some rows densely, or all of them: one loss and one gradient, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SAES, exact
from saex.sae.base import split
from saex.sharding import MeshConfig, make_mesh, shardings

B, D, N = 64, 16, 128
# Latents open in few rows, so that the sizes of rows alone decide how many one needs.
METHODS = {
    "batch_topk": {"k": 4, "dead_after_tokens": 1},
    "jump_relu": {"threshold": 0.3, "bandwidth": 0.1, "l0": 0.1, "l0_warmup_steps": 10},
    "relu": {"l1": 0.1, "l1_warmup_steps": 10},
    "gated": {"l1_warmup_steps": 10},
    "matryoshka": {"k": 4, "dead_after_tokens": 1},
    "transcoder": {"d_out": D, "l1": 0.1, "l1_warmup_steps": 10},
    "crosscoder": {"widths": (10, 6), "l1": 0.1, "l1_warmup_steps": 10},
    "batch_crosscoder": {"widths": (10, 6), "k": 4, "dead_after_tokens": 1},
    "mutual_choice": {"k": 4},
}
CORE = ("batch_topk", "jump_relu", "relu")
NAMES = [n if n in CORE else pytest.param(n, marks=pytest.mark.methods) for n in METHODS]


def batch_of(sae, wide=2):
    """Rows of one size, and some that are many times as large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[np.linspace(1, B - 2, wide).astype(int)] *= 9
    return {name: jnp.asarray(x if name == "x" else x[:, ::-1]) for name in sae.columns}


def made(name, capacity):
    own = {"group_capacity": capacity} if name == "matryoshka" and capacity else {}
    return SAES[name](d_in=D, n=N, capacity=capacity, **METHODS[name], **own)


def start(sae, batch):
    params, stats = sae.init(jax.random.key(1), batch)
    if not hasattr(sae, "k") and "log_threshold" not in params:
        params["b_enc"] = params["b_enc"] - 0.6 * jnp.linalg.norm(params["W_enc"], axis=1)
    return params, stats


def loss_of(sae, params, stats, batch):
    """(loss, gradients by name, Out)."""
    trained, frozen = split(params, sae.specs()["params"])
    hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": 100}.items()}

    def loss(trained):
        args = {**trained, **frozen}, stats, batch, jax.random.key(2), jnp.int32(50), hyper
        return sae.loss(*args)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    return jax.device_get((value, grads, out))


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for name, g in wanted[1].items():
        np.testing.assert_allclose(
            found[1][name], g, atol=2e-5 * np.abs(g).max(), rtol=1e-4, err_msg=name
        )
    np.testing.assert_allclose(found[2].reconstruction, wanted[2].reconstruction, atol=2e-5)
    np.testing.assert_array_equal(found[2].stats["since_fired"], wanted[2].stats["since_fired"])
    for name in ("fvu", "l0", "dead"):
        np.testing.assert_allclose(found[2].metrics[name], wanted[2].metrics[name], rtol=1e-4)


def dense_one(name, wide):
    """(rows, params, stats, loss and gradients) of the method without candidates."""
    sae = made(name, 0)
    batch = batch_of(sae, wide)
    params, stats = start(sae, batch)
    return batch, params, stats, loss_of(sae, params, stats, batch)


WAYS = {"sparse": (N, 2), "mixed": (20, 2), "dense": (4, 40)}  # capacity, wide rows of 64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_all_ways_have_the_dense_one_s_values_and_gradients(name, way):
    capacity, wide = WAYS[way]
    batch, params, stats, wanted = dense_one(name, wide)
    found = loss_of(made(name, capacity), params, stats, batch)
    share = found[2].metrics["wide_rows"]
    assert share == {"sparse": 0, "mixed": wide / B, "dense": 1}[way]
    told = found[2].stats["fallbacks"], found[2].stats["fell_back"], found[2].metrics["fallback"]
    assert told == 3 * (way == "dense",)
    assert_same(found, wanted)


@pytest.mark.parametrize("config", [MeshConfig(2, 2), MeshConfig(1, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_wide_rows_on_meshes(name, config):
    """On each device of latents other rows are wide: what they make is added up."""
    batch, params, stats, wanted = dense_one(name, 2)
    mesh, specs = make_mesh(config), made(name, 0).specs()
    with jax.set_mesh(mesh):
        how = shardings({**specs["params"], **specs["stats"]}, mesh)
        on_mesh = [{k: jax.device_put(v, how[k]) for k, v in a.items()} for a in (params, stats)]
        rows = jax.NamedSharding(mesh, jax.P("data"))
        placed = {k: jax.device_put(v, rows) for k, v in batch.items()}
        found = loss_of(made(name, 24 // config.model), *on_mesh, placed)
    assert 0 < found[2].metrics["wide_rows"] < 0.2 and not found[2].metrics["fallback"]
    assert_same(found, wanted)


def test_candidates_are_not_looked_for_in_most_steps_after_dense_ones():
    x, W = jnp.ones((4, D)), jnp.ones((N, D))
    weights = (x, jnp.zeros(D), W, jnp.arange(N, dtype=jnp.float32))
    looked = {0, 1, 2, 4, 8, 16, 32, 48, 64, 80}
    for in_a_row in (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 48, 49, 80):
        wanted = in_a_row in looked
        stats = {"fell_back": jnp.int32(in_a_row), "fallbacks": jnp.int32(90)}
        _, indices, tried = exact.candidates(stats, weights, 3, "float32")
        assert bool(tried) == wanted
        if wanted:
            np.testing.assert_array_equal(indices, np.tile([N - 1, N - 2, N - 3], (4, 1)))
        way = exact.way(jnp.zeros(4, bool), tried)
        assert int(way) == (exact.SPARSE if wanted else exact.DENSE)
        told, marks = exact.counted(({}, stats), way, jnp.zeros(4, bool))
        assert int(marks["fallbacks"]) == 90 + (not wanted)
        assert int(marks["fell_back"]) == (0 if wanted else in_a_row + 1)
        assert float(told["wide_rows"]) == float(told["fallback"]) == (not wanted)


@pytest.mark.parametrize("way", [exact.SPARSE, exact.MIXED, exact.DENSE])
def test_exactly_takes_one_way_with_its_gradients(way):
    def power(n):
        return lambda w: (jnp.sum(w["a"] ** n), {"which": jnp.float32(n)})

    @jax.jit
    def run(w, way):
        def loss(w):
            value, aux = exact.exactly(way, *(power(n) for n in (1, 2, 3)), w)
            return 2 * value, aux

        return jax.value_and_grad(loss, has_aux=True)(w)

    (value, aux), grads = run({"a": jnp.arange(3.0)}, jnp.int32(way))
    assert (float(value), float(aux["which"])) == ((6, 1), (10, 2), (18, 3))[way]
    np.testing.assert_allclose(grads["a"], [[2, 2, 2], [0, 4, 8], [0, 6, 24]][way])


def test_there_is_room_for_some_wide_rows():
    wide = np.zeros(96, bool)
    wide[[5, 40, 90]] = True
    assert exact.room(96) == 3 and int(exact.way(jnp.asarray(wide))) == exact.MIXED
    rows, places = exact.wide_rows(jnp.asarray(wide))
    np.testing.assert_array_equal(rows, [5, 40, 90])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(places) < 3), [5, 40, 90])
    wide[0] = True
    assert int(exact.way(jnp.asarray(wide))) == exact.DENSE
    rows, places = exact.wide_rows(jnp.zeros(96, bool))
    assert (np.asarray(rows) == 96).all() and (np.asarray(places) == 3).all()
