"""Gradients on meshes are those of one device: array by array, raw, before any optimiser.

Adam takes a gradient that is too large by a constant for the right one; here it shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.topk import cpu
from saex.sae import TopK
from saex.sae.base import split
from saex.sharding import MeshConfig, make_mesh, shardings
from saex.train.optim import Optim
from saex.train.state import TrainState
from saex.train.step import hyper_arrays, make_step
from tests.kernels import oracles
from tests.sae import toy
from tests.sae.small import D, N, small

ROWS, STEP = 128, 50
ONE = MeshConfig()
MESHES = [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(1, 8), MeshConfig(2, 4, "fsdp")]
OF = {name: small(name, dead_after_tokens=1000) for name in ("topk", "batch_topk", "jump_relu")}
# too little room, and a cut that is not where it is looked for: the batch is done densely
OF |= {"relu": small("relu"), "densely": small("batch_topk", capacity=4, dead_after_tokens=1000)}


def rows(i, count=ROWS):
    return jnp.asarray(3 * toy.batch(toy.directions(40, D), count, 3, i) + 0.5)


@functools.cache
def start(sae):
    """(params, stats) near the initial ones, with nothing tied, and a third of latents dead."""
    params, stats = sae.init(jax.random.key(0), {"x": rows(0)})
    rng = np.random.default_rng(1)
    params |= {k: v + 0.05 * rng.normal(size=v.shape) for k, v in params.items() if v.ndim}
    for name in ("W_enc", "b_enc"):
        params[name] = params[name].at[::3].multiply(0.02)
    params["W_dec"] /= jnp.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    stats = {**stats, "since_fired": stats["since_fired"].at[::3].set(10**6)}
    if "last_cut" in stats:
        stats["last_cut"] *= 0.5 if sae.capacity > sae.k else 2.0  # that of what was changed here
    return jax.device_get((params, stats))


def on(mesh, sae, params, stats, strategy="tp"):
    where = shardings(sae.specs(), mesh, strategy)
    return jax.device_put((params, stats), (where["params"], where["stats"]))


def gradients(sae, config, params, stats, x):
    """(loss, gradients of the trainable params, metrics) of one batch, on a mesh."""
    mesh = make_mesh(config)
    hyper = hyper_arrays(sae, Optim(), 100)

    @jax.jit
    def both(params, stats, x):
        trainable, frozen = split(params, sae.specs()["params"])

        def loss(trainable):
            params = {**trainable, **frozen}
            value, out = sae.loss(params, stats, {"x": x}, None, jnp.int32(STEP), hyper)
            return value, out.metrics

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    with jax.set_mesh(mesh):
        placed = on(mesh, sae, params, stats, config.strategy)
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        (loss, metrics), grads = jax.device_get(both(*placed, x))
    return loss, grads, metrics


def norm_of_step(sae, config, params, stats, x):
    """The gradient's norm that a training step tells."""
    mesh, optim = make_mesh(config), Optim()
    with jax.set_mesh(mesh):
        params, stats = on(mesh, sae, params, stats, config.strategy)
        opt_state = optim.transformation().init(split(params, sae.specs()["params"])[0])
        state = TrainState(jnp.int32(STEP), params, opt_state, stats)
        batch = {"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))}
        step, hyper = make_step(sae, optim, 100), hyper_arrays(sae, optim, 100)
        return float(step(state, batch, jax.random.key(0), hyper)[1]["grad_norm"])


def norm(sae, params, grads):
    """Of gradients without the part along each row of norm 1, in numpy."""
    total = 0.0
    for name, g in grads.items():
        if name in sae.unit_rows:
            w = np.float64(params[name])
            g = g - np.sum(g * w, axis=1, keepdims=True) * w
        total += np.sum(np.square(np.float64(g)))
    return total**0.5


def same(got, want):
    """To 1e-5 of each array's own size."""
    assert got.keys() == want.keys()
    for name in want:
        size = np.linalg.norm(want[name])
        assert size > 0, name
        assert np.linalg.norm(got[name] - want[name]) <= 1e-5 * size, name


@functools.cache
def alone(name):
    return gradients(OF[name], ONE, *start(OF[name]), rows(1))


LONG = [(name, config) for name in ("batch_topk", "jump_relu") for config in MESHES[::2]]
EVERY = [
    pytest.param(name, config, marks=pytest.mark.methods if (name, config) in LONG else [])
    for name in OF
    for config in MESHES
    if name != "densely"
]


@pytest.mark.parametrize(("name", "config"), [*EVERY, ("densely", MeshConfig(2, 4))], ids=str)
def test_gradients_of_the_loss_are_those_of_one_device(name, config):
    sae = OF[name]
    loss, grads, metrics = gradients(sae, config, *start(sae), rows(1))
    np.testing.assert_allclose(loss, alone(name)[0], rtol=1e-5)
    same(grads, alone(name)[1])
    assert metrics.get("aux_served", 1) > 0
    assert metrics.get("fallback", 0) == (name == "densely")


@pytest.mark.parametrize("config", [ONE, MESHES[1], MESHES[3]], ids=str)
@pytest.mark.parametrize("name", ["topk", "relu"])
def test_the_norm_that_a_step_tells_is_that_of_one_device(name, config):
    sae = OF[name]
    params, stats = start(sae)
    found = norm_of_step(sae, config, params, stats, rows(1))
    np.testing.assert_allclose(found, norm(sae, params, alone(name)[1]), rtol=1e-5)


def tied(k):
    """(sae, params, stats, rows): a latent and its twins on other devices score alike, exactly."""
    sae = TopK(D, N, k, normalize="none", aux_coefficient=0.0)
    params, stats = start(sae)
    W, x, b = oracles.whole_numbers(3, (N // 4, D), (32, D), (N // 4,))
    twins = {"W_enc": jnp.tile(W, (4, 1)), "b_enc": jnp.tile(b, 4), "b_dec": jnp.zeros(D)}
    return sae, {**params, **twins}, stats, x


@pytest.mark.parametrize("config", [MeshConfig(2, 4), MeshConfig(1, 8)], ids=str)
def test_of_equal_scores_on_several_devices_the_lowest_latent_wins(config):
    sae, params, stats, x = tied(k=6)  # of four twins the last two at the cut are left out
    scores = np.asarray(x @ params["W_enc"].T + params["b_enc"][None])
    values, order = oracles.top_k(scores, 7)
    assert (values[:, 5] == values[:, 6]).all()
    params["W_dec"] = params["W_dec"] * 0.9  # no twin decodes like another
    _, want, _ = gradients(sae, ONE, params, stats, x)
    _, got, _ = gradients(sae, config, params, stats, x)
    same(got, want)
    chosen = np.zeros(N, bool)
    np.put(chosen, order[:, :6][values[:, :6] > 0], True)
    np.testing.assert_array_equal(np.asarray(got["W_dec"]).any(1), chosen)
    assert not chosen.all()


@pytest.mark.parametrize("config", [MeshConfig(2, 4)], ids=str)
def test_the_network_selects_in_a_step_on_a_mesh(config, monkeypatch):
    """Shapes of its own, so that nothing compiled with the other selection is met."""
    sae = TopK(D, 1024, 5, dead_after_tokens=1000)
    params, stats = start(sae)
    want = gradients(sae, ONE, params, stats, rows(1, 64))
    widths, largest = [], cpu.largest

    def seen(keys, *rest):
        widths.append(keys.shape)
        return largest(keys, *rest)

    monkeypatch.setattr(cpu, "SCORES", 1)
    monkeypatch.setattr(cpu, "largest", seen)
    loss, grads, _ = gradients(sae, config, params, stats, rows(1, 64))
    assert widths
    np.testing.assert_allclose(loss, want[0], rtol=1e-5)
    same(grads, want[1])
