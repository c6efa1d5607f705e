"""What is found sparsely, or all densely: one loss and one gradient, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels import encode_above, sparse_decode
from saex.sae import SAES, exact
from saex.sae.base import split
from saex.sharding import MeshConfig, make_mesh, shardings

B, D, N = 64, 16, 128


@pytest.fixture(scope="module", autouse=True)
def wide():
    """Sparse products as of dictionaries of usual widths: these latents are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_decode.cpu, "NARROW", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


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
    return SAES[name](d_in=D, n=N, capacity=capacity, **METHODS[name])


def start(sae, batch):
    params, stats = sae.init(jax.random.key(1), batch)
    if not hasattr(sae, "k") and "log_threshold" not in params:
        params["b_enc"] = params["b_enc"] - 0.6 * jnp.linalg.norm(params["W_enc"], axis=1)
    return params, stats


@functools.cache
def compiled(sae):
    """One program for all that a test changes: numbers of every kind are its arguments."""

    def loss(trained, frozen, stats, batch, hyper):
        args = {**trained, **frozen}, stats, batch, jax.random.key(2), jnp.int32(50), hyper
        return sae.loss(*args)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_of(sae, params, stats, batch, **hyper):
    """(loss, gradients by name, Out)."""
    trained, frozen = split(params, sae.specs()["params"])
    hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": 100, **hyper}.items()}
    (value, out), grads = compiled(sae)(trained, frozen, stats, batch, hyper)
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


@functools.cache
def dense_one(name, wide):
    """(rows, params, stats, loss and gradients) of the method, densely."""
    sae = made(name, 0)
    batch = batch_of(sae, wide)
    params, stats = start(sae, batch)
    return batch, params, stats, loss_of(sae, params, stats, batch)


WAYS = {"sparse": (N, 2), "little room": (16, 2), "dense": (4, 40)}  # capacity, large rows of 64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_both_ways_have_the_dense_one_s_values_and_gradients(name, way):
    capacity, wide = WAYS[way]
    if way == "dense" and "k" not in METHODS[name]:
        capacity = 1
    batch, params, stats, wanted = dense_one(name, wide)
    found = loss_of(made(name, capacity), params, stats, batch)
    told = found[2].stats["fallbacks"], found[2].stats["fell_back"], found[2].metrics["fallback"]
    assert told == 3 * (way == "dense",)
    assert_same(found, wanted)


@pytest.mark.parametrize("k", [1.0, 2.5])
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_a_sweep_s_smaller_k_and_drawn_prefixes(name, k):
    """Also in a step that does not look: the one after three dense ones."""
    drawn = {"sampled": 3} if name == "matryoshka" else {}
    sparse, dense = (SAES[name](D, N, 4, capacity=c, **drawn) for c in (N, 0))
    batch = batch_of(sparse)
    params, stats = start(dense, batch)
    wanted = loss_of(dense, params, stats, batch, k=k)
    for fell_back in (0, 3):
        marked = {**stats, "fell_back": jnp.int32(fell_back)}
        found = loss_of(sparse, params, marked, batch, k=k)
        assert found[2].metrics["fallback"] == (fell_back == 3)
        assert_same(found, wanted)


def test_one_device_without_room_sends_all_the_dense_way():
    """All the large rows lie on one device of rows."""
    sae, dense = (SAES["relu"](D, N, capacity=c, **METHODS["relu"]) for c in (4, 0))
    x = np.array(batch_of(dense, 0)["x"])
    x[:16] *= 9
    batch = {"x": jnp.asarray(x)}
    params, stats = start(dense, batch)
    wanted = loss_of(dense, params, stats, batch)
    assert wanted[2].metrics["l0"] < 4 * N / 4  # of the four devices' room together
    mesh = make_mesh(MeshConfig(4, 1))
    with jax.set_mesh(mesh):
        placed = {"x": jax.device_put(batch["x"], jax.NamedSharding(mesh, jax.P("data")))}
        found = loss_of(sae, params, stats, placed)
    assert found[2].metrics["fallback"] == 1
    assert_same(found, wanted)


@pytest.mark.parametrize("last", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_a_batch_s_cut_may_be_anywhere(name, last):
    """It is looked for below the last one: that may not be known, or be too high."""
    batch, params, stats, wanted = dense_one(name, 2)
    stats = {**stats, "last_cut": last * wanted[2].metrics["cut"]}
    found = loss_of(made(name, N), params, stats, batch)
    assert found[2].metrics["fallback"] == (last > 1)
    np.testing.assert_allclose(found[2].stats["last_cut"], wanted[2].metrics["cut"], rtol=1e-6)
    assert_same(found, wanted)


@pytest.mark.parametrize("config", [MeshConfig(2, 2), MeshConfig(1, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lines_on_meshes(name, config):
    """On each device rows have other numbers of latents: what they make is added up."""
    batch, params, stats, wanted = dense_one(name, 2)
    mesh, specs = make_mesh(config), made(name, 0).specs()
    with jax.set_mesh(mesh):
        how = shardings({**specs["params"], **specs["stats"]}, mesh)
        on_mesh = [{k: jax.device_put(v, how[k]) for k, v in a.items()} for a in (params, stats)]
        rows = jax.NamedSharding(mesh, jax.P("data"))
        placed = {k: jax.device_put(v, rows) for k, v in batch.items()}
        found = loss_of(made(name, 24), *on_mesh, placed)
    assert not found[2].metrics["fallback"]
    assert_same(found, wanted)


def test_nothing_is_looked_for_in_most_steps_after_dense_ones():
    x, W = jnp.ones((4, D)), jnp.ones((N, D))
    weights = (x, jnp.zeros(D), W, jnp.arange(N, dtype=jnp.float32))
    looked = {0, 1, 2, 4, 8, 16, 32, 48, 64, 80}
    for in_a_row in (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 48, 49, 80):
        wanted = in_a_row in looked
        stats = {"fell_back": jnp.int32(in_a_row), "fallbacks": jnp.int32(90)}
        above = exact.found(stats, weights, N - 3.5 + D, 4, "float32")
        assert bool(exact.everywhere(above.whole)) == wanted
        if wanted:
            assert int(jnp.sum(above.values > -jnp.inf)) == 12
        told, marks = exact.counted(({}, stats), above.whole)
        assert int(marks["fallbacks"]) == 90 + (not wanted)
        assert int(marks["fell_back"]) == (0 if wanted else in_a_row + 1)
        assert float(told["fallback"]) == (not wanted)


@pytest.mark.parametrize("enough", [True, False])
def test_exactly_takes_one_way_with_its_gradients(enough):
    def power(n):
        return lambda w: (jnp.sum(w["a"] ** n), {"which": jnp.float32(n)})

    @jax.jit
    def run(w, enough):
        def loss(w):
            value, aux = exact.exactly(enough, power(1), power(3), w)
            return 2 * value, aux

        return jax.value_and_grad(loss, has_aux=True)(w)

    (value, aux), grads = run({"a": jnp.arange(3.0)}, enough)
    assert (float(value), float(aux["which"])) == ((6, 1) if enough else (18, 3))
    np.testing.assert_allclose(grads["a"], [2, 2, 2] if enough else [0, 6, 24])


def test_there_is_room_as_asked_or_where_it_pays():
    room = encode_above.room_for
    assert room(5, 4) == 4 and room(0, 4096, 8) == 0 and room(200, 4096) == 200
    pays = encode_above.PAY_FROM * 2 * 8
    assert room(None, pays, 8) == 16 and room(None, pays - 1, 8) == 0
    least, most = encode_above.USUAL
    n = encode_above.LEVEL_AT * least
    assert [room(None, m) for m in (n - 1, n, 2 * n, 10**6)] == [0, least, 2 * least, most]
