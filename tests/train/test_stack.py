"""Members of a stack are their single runs: on slots, on places of a mesh, with a bad neighbour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SAES
from saex.sharding import MeshConfig, make_mesh
from saex.train import stack
from saex.train.optim import Optim
from saex.train.state import init_state
from saex.train.step import hyper_arrays, make_step
from tests.sae import toy
from tests.sae.small import D, small

STEPS = 8
TRUTH = toy.directions(40, D)


def batch(sae, i):
    """All columns that the method reads."""
    return toy.columns(sae, 3 * toy.batch(TRUTH, 128, 3, i) + 0.5, i)


def of(name, **fields):
    return small(name, dead_after_tokens=300, **fields)


def members(name):
    """Members that differ in seed, rate, and what their method may vary: four, or two of methods
    that vary nothing, as each is compiled once more.
    """
    if name == "topk":  # so wide that all k are done by one form of the kernels
        saes = [
            of("topk", n=80, k=k, aux_coefficient=c)
            for k, c in ((4, 0.1), (4, 0.5), (2, 0.1), (3, 0.1))
        ]
    elif name == "relu":
        saes = [of("relu", l1=l1) for l1 in (0.01, 0.05, 0.1, 0.2)]
    elif name == "batch_topk":  # room for one member's latents, in some steps for the other's
        saes = [of("batch_topk", k=k, capacity=6) for k in (5, 2)]
    else:
        saes = [of(name)] * 2
    return saes, [Optim(lr=lr) for lr in (1e-3, 3e-3, 3e-3, 1e-2)[: len(saes)]]


def state_of(sae, optim, seed, mesh, strategy="tp"):
    sample = jax.tree.map(jnp.asarray, batch(sae, 10**6))
    with jax.set_mesh(mesh):
        return init_state(sae, optim.transformation(), jax.random.key(seed), sample, mesh, strategy)


def run(name, config, change=lambda m, state: state):
    """(arrays of each member, its losses) of a stack."""
    saes, optims = members(name)
    mesh = make_mesh(config)
    states = [
        change(m, state_of(saes[m], optims[m], m, stack.place_of(mesh, m), config.strategy))
        for m in range(len(saes))
    ]
    step = stack.make_stack_step(saes[0], optims[0], STEPS)
    slots = stack.join(states, mesh)
    keys = stack.join([jax.random.key(m) for m in range(len(saes))], mesh)
    hypers = stack.join([hyper_arrays(*pair, STEPS) for pair in zip(saes, optims)], mesh)
    losses = []
    with jax.set_mesh(mesh):
        for i in range(STEPS):
            rows = jax.device_put(batch(saes[0], i), jax.NamedSharding(mesh, jax.P("data")))
            slots, metrics = step(slots, rows, keys, hypers)
            told = [stack.metrics_of(metrics, m, mesh) for m in range(len(saes))]
            losses.append([float(one["loss"]) for one in told])
    return [arrays_of(stack.member(slots, m, mesh)) for m in range(len(saes))], np.array(losses).T


def arrays_of(state):
    """Params and stats."""
    return jax.device_get({**state.params, **state.stats})


@pytest.fixture(scope="module")
def alone():
    """(method, member) -> (arrays, losses) of the member, trained by itself on one device."""

    @functools.cache
    def single(sae, optim, seed):
        mesh = make_mesh(MeshConfig())
        state, losses = state_of(sae, optim, seed, mesh), []
        with jax.set_mesh(mesh):
            step, hyper = make_step(sae, optim, STEPS), hyper_arrays(sae, optim, STEPS)
            for i in range(STEPS):
                rows = jax.device_put(batch(sae, i), jax.NamedSharding(mesh, jax.P("data")))
                state, metrics = step(state, rows, jax.random.key(seed), hyper)
                losses.append(float(metrics["loss"]))
        return arrays_of(state), losses

    return lambda name, m: single(*(part[m] for part in members(name)), m)


# TopK by default; the others on one device with the methods' tests, on meshes before a release.
SPREAD = MeshConfig(data=2, model=2, sweep=2, strategy="fsdp")
OTHERS = [name for name in sorted(SAES) if name != "topk"]
EVERY = [
    ("topk", MeshConfig()),
    ("topk", SPREAD),
    pytest.param("topk", MeshConfig(sweep=2), marks=pytest.mark.slow),
    *(pytest.param(name, MeshConfig(), marks=pytest.mark.methods) for name in OTHERS),
    *(pytest.param(name, MeshConfig(sweep=2), marks=pytest.mark.slow) for name in OTHERS),
    *(pytest.param(name, SPREAD, marks=pytest.mark.slow) for name in OTHERS),
]


@pytest.mark.parametrize(("name", "config"), EVERY, ids=str)
def test_each_member_is_its_single_run(name, config, alone):
    ended, losses = run(name, config)
    for m in range(len(ended)):
        arrays, expected = alone(name, m)
        if config.size == 1:  # the same operations, one member's behind the other's: the same bits
            np.testing.assert_array_equal(losses[m], expected)
            jax.tree.map(np.testing.assert_array_equal, ended[m], arrays)
        np.testing.assert_allclose(losses[m], expected, rtol=1e-5)
        for key in members(name)[0][m].specs()["params"]:
            np.testing.assert_allclose(ended[m][key], arrays[key], atol=1e-4, err_msg=key)
    assert len({round(float(loss), 4) for loss in losses[:, -1]}) == len(ended)  # they do differ
    if name == "batch_topk" and config.size == 1:  # a device of fewer latents has room for more
        assert ended[0]["fallbacks"] > ended[1]["fallbacks"], "in some step they go different ways"


FAIL = [MeshConfig(), MeshConfig(sweep=2)]


@pytest.mark.parametrize("config", FAIL[1:], ids=str)
def test_a_member_that_is_not_finite_leaves_the_others_alone(config, alone):
    def spoil(m, state):
        return (
            state.replace(params={**state.params, "b_enc": state.params["b_enc"] * jnp.nan})
            if m == 1
            else state
        )

    ended, losses = run("topk", config, spoil)
    assert not np.isfinite(losses[1]).any()
    for m in (0, 2, 3):
        np.testing.assert_allclose(losses[m], alone("topk", m)[1], rtol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in ended[m].values())


@pytest.mark.parametrize("config", FAIL, ids=str)
def test_a_loss_that_overflows_leaves_a_members_numbers_finite(config, alone):
    """Its params are so large that the loss is infinite: it stays where it is, step for step."""

    def spoil(m, state):
        grown = {**state.params, "b_dec": state.params["b_dec"] + 1e25}
        return state.replace(params=grown) if m == 1 else state

    ended, losses = run("topk", config, spoil)
    assert not np.isfinite(losses[1]).any()
    assert all(np.isfinite(leaf).all() for leaf in ended[1].values())
    np.testing.assert_array_equal(ended[1]["b_dec"], np.float32(1e25))
    for m in (0, 2, 3):
        np.testing.assert_allclose(losses[m], alone("topk", m)[1], rtol=1e-5)


def test_members_that_the_places_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"3 members cannot be spread over mesh\.sweep=2"):
        stack.join([jnp.zeros(())] * 3, make_mesh(MeshConfig(sweep=2)))
