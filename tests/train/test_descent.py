"""One pass over each matrix equals optax between a projection and a normalisation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saex.kernels.adam import Scalars, adam
from saex.sharding import MeshConfig, make_mesh
from saex.train.descent import descend, descend_fused
from saex.train.optim import Optim

SHAPES = {"W_enc": (24, 16), "W_dec": (24, 16), "b_enc": (24,), "b_dec": (16,), "W_3": (4, 5, 6)}
SPECS = {"W_enc": ("model",), "W_dec": ("model",), "b_enc": ("model",)}


def drawn(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    made = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    for k in set(made) & {"W_dec"}:
        made[k] /= np.linalg.norm(made[k], axis=1, keepdims=True)
    return {k: jnp.asarray(v) for k, v in made.items()}


def ran(how, optim, mesh=None, specs=SPECS, steps=5):
    """Params, state, norms and totals after some updates with gradients of changing size."""
    params = drawn(0)
    if mesh is not None:
        lay = {k: jax.NamedSharding(mesh, jax.P(*specs.get(k, ()))) for k in params}
        params = {k: jax.device_put(v, lay[k]) for k, v in params.items()}
    state, norms = optim.transformation().init(params), []
    step = jax.jit(functools.partial(how, optim, ("W_dec",)))
    for i in range(steps):
        grads = {k: v * 3.0**-i for k, v in drawn(i + 1).items()}
        if mesh is not None:
            grads = {k: jax.device_put(v, lay[k]) for k, v in grads.items()}
        params, state, norm, total = step(params, grads, state, jnp.float32(0.1))
        norms += [norm, total]
    return jax.device_get((params, state, norms))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_fused_is_the_chain_to_rounding(clip):
    optim = Optim(lr=0.1, clip=clip)
    want = ran(descend, optim)
    same(ran(descend_fused, optim), want)
    assert clip is None or not np.allclose(
        want[0]["W_enc"], ran(descend, Optim(lr=0.1))[0]["W_enc"]
    )


@pytest.mark.parametrize(
    "specs", [SPECS, {**SPECS, "W_dec": ("model", "data")}], ids=["tp", "fsdp"]
)
def test_on_a_mesh_it_is_the_same(specs):
    mesh = make_mesh(MeshConfig(2, 4))
    optim = Optim(lr=0.1, clip=0.5)
    with jax.set_mesh(mesh):
        found = ran(descend_fused, optim, mesh, specs)
    same(found, ran(descend, optim))


def test_unit_rows_stay_unit_and_move_along_the_sphere():
    params, grads = drawn(0), drawn(1)
    state = Optim().transformation().init(params)
    new = descend(Optim(), ("W_dec",), params, grads, state, 0.1).params
    np.testing.assert_allclose(np.linalg.norm(new["W_dec"], axis=1), 1, rtol=1e-6)
    assert np.abs(np.linalg.norm(new["W_enc"], axis=1) - 1).max() > 0.1
    along = {**grads, "W_dec": 3 * params["W_dec"]}  # nothing of it is along the sphere
    stays = descend(Optim(eps=1e-2), ("W_dec",), params, along, state, 0.1).params["W_dec"]
    np.testing.assert_allclose(stays, params["W_dec"], atol=1e-4)


@pytest.mark.parametrize("unit", [True, False])
def test_reference_is_optax(unit):
    shapes = {"W_dec": (24, 16)}
    W, g, tx = drawn(0, shapes), drawn(1, shapes), optax.scale_by_adam(0.9, 0.99, 1e-8)
    state = tx.init(W)
    _, state = tx.update(drawn(2, shapes), state)
    count = 2
    scalars = Scalars(*map(jnp.float32, (0.1, 1 - 0.9**count, 1 - 0.99**count, 0.5)))
    found = adam(
        W["W_dec"],
        g["W_dec"],
        state.mu["W_dec"],
        state.nu["W_dec"],
        scalars,
        (0.9, 0.99),
        1e-8,
        unit,
    )
    if unit:
        flat = g["W_dec"] - np.sum(g["W_dec"] * W["W_dec"], 1, keepdims=True) * W["W_dec"]
        g = {"W_dec": flat}
    u, state = tx.update({"W_dec": 0.5 * g["W_dec"]}, state)
    want = W["W_dec"] - 0.1 * u["W_dec"]
    want = want / np.linalg.norm(want, axis=1, keepdims=True) if unit else want
    same(tuple(found[:3]), (want, state.mu["W_dec"], state.nu["W_dec"]))
    np.testing.assert_allclose(found.squares, np.square(g["W_dec"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.total, want.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [descend, descend_fused])
def test_a_gradient_that_does_not_count_may_be_anything(how):
    params, optim = drawn(0), Optim(clip=0.5)
    hurt = jax.tree.map(lambda g: g * jnp.nan, drawn(1))
    state = optim.transformation().init(params)
    found = how(optim, ("W_dec",), params, hurt, state, 0.1, False)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found.params, params)
    assert np.isfinite(found.total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.opt_state))


def test_a_number_that_is_not_finite_is_told():
    params, grads = drawn(0), drawn(1)
    state = Optim().transformation().init(params)
    for name, how in itertools.product(("W_enc", "W_dec"), (descend, descend_fused)):
        hurt = {**grads, name: grads[name].at[3, 2].set(jnp.nan)}
        found = how(Optim(), ("W_dec",), params, hurt, state, 0.1)
        assert not np.isfinite(found.total) and not np.isfinite(found.norm)
        assert np.isfinite(np.delete(found.params[name], 3, axis=0)).all()
        clipped = Optim(clip=0.5)
        hurt = {**grads, name: grads[name].at[3, 2].set(jnp.inf)}
        found = how(clipped, ("W_dec",), params, hurt, clipped.transformation().init(params), 0.1)
        assert not np.isfinite(found.total) and not np.isfinite(found.norm)
