"""What every row of SAES promises; a new method gets these tests with its line in the table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SAES, SparseCodes
from saex.sae.transform import fold_scale
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy
from tests.sae.small import HELD, small


def rows(sae, i, count=128):
    """Raw rows [count, d_in]."""
    return 3 * toy.batch(toy.directions(40, sae.d_in), count, 3, i) + 0.5


def batch(sae, i, count=128):
    """All columns that the method reads."""
    return toy.columns(sae, rows(sae, i, count), i)


@functools.cache
def init(sae):
    return sae.init(jax.random.key(0), jax.tree.map(jnp.asarray, batch(sae, 0)))


@pytest.fixture(params=sorted(SAES))
def sae(request):
    return small(request.param)


@pytest.fixture
def params(sae):
    """Initial ones; weights that start at 0 would hide what is done with them."""
    params, _ = init(sae)

    def noise(a):
        return 0.3 * jax.random.normal(jax.random.key(5), a.shape)

    return {k: v if v.ndim < 2 or v.any() else noise(v) for k, v in params.items()}


def test_specs_say_what_init_makes(sae):
    made = jax.eval_shape(sae.init, jax.random.key(0), batch(sae, 0))
    for said, tree in zip((sae.specs()["params"], sae.specs()["stats"]), made):
        assert {k: (v.shape, v.dtype) for k, v in tree.items()} == {
            k: (s.shape, np.dtype(s.dtype)) for k, s in said.items()
        }


def test_a_dictionary_is_hashable_and_owns_no_arrays(sae):
    assert hash(sae) == hash(dataclasses.replace(sae)) and sae == dataclasses.replace(sae)


def test_codes_are_canonical(sae, params):
    codes = sae.encode(params, rows(sae, 1, 16))
    assert isinstance(codes, sae.codes)
    if isinstance(codes, SparseCodes):
        values, indices = np.asarray(codes.values), np.asarray(codes.indices)
        assert not indices[values == 0].any()
        for row, used in zip(indices, values != 0):
            assert len(set(row[used])) == used.sum()
    assert np.asarray(codes.dense(sae.n)).shape == (16, sae.n)


def test_inference_is_per_row(sae, params):
    x = rows(sae, 2, 16)
    whole = np.asarray(sae.encode(params, x).dense(sae.n))
    for i in (0, 7, 15):
        one = np.asarray(sae.encode(params, x[i : i + 1]).dense(sae.n))
        np.testing.assert_allclose(one[0], whole[i], atol=1e-6)


def test_decode_is_affine_in_the_codes(sae, params):
    one, two = (sae.encode(params, rows(sae, i, 16)) for i in (3, 4))
    bias = np.asarray(sae.decode(params, jax.tree.map(lambda a: a * 0, one)))
    double = one.replace(values=one.values * 2)
    np.testing.assert_allclose(
        sae.decode(params, double) - bias, 2 * (sae.decode(params, one) - bias), atol=1e-4
    )
    assert np.ptp(bias, axis=0).max() == 0
    assert np.abs(sae.decode(params, two) - sae.decode(params, one)).max() > 0.1


def test_folding_the_scale_changes_nothing(sae, params):
    x, folded = rows(sae, 5, 16), fold_scale(params)
    assert np.all(params["scale"] != 1) and np.all(folded["scale"] == 1)
    before, after = sae.encode(params, x), sae.encode(folded, x)
    np.testing.assert_allclose(before.dense(sae.n), after.dense(sae.n), atol=1e-5)
    np.testing.assert_allclose(
        sae.decode(params, before), sae.decode(folded, after), rtol=1e-4, atol=1e-4
    )


SPLIT = MeshConfig(2, 4, "fsdp")
OTHER = [MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(1, 8)]


def agreement():
    """All meshes for one method; for the others one that splits all there is to split."""
    for name in sorted(SAES):
        yield pytest.param(name, [SPLIT, *(OTHER if name == "topk" else [])], id=name)
        if name != "topk":
            yield pytest.param(name, OTHER, id=f"{name}-everywhere", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "meshes"), list(agreement()))
def test_loss_falls_and_meshes_agree(name, meshes):
    """20 steps: the same losses to 1e-5 on every mesh; they fall; trainable params move, alone."""
    sae = small(name, dead_after_tokens=100)  # AuxK has latents to serve
    made = functools.partial(batch, sae)
    optim, start = Optim(lr=3e-3), {}

    def seen(params):
        start.update(jax.device_get(params))
        return params

    reference, history = toy.fit(sae, made, optim, make_mesh(MeshConfig()), 20, change=seen)
    expected = [m["loss"] for m in history]
    assert expected[-1] < 0.9 * expected[0]
    for one, spec in sae.specs()["params"].items():
        assert not (spec.trainable and one in sae.frozen)
        if one not in sae.frozen:
            assert (np.abs(start[one] - reference[one]).max() > 1e-4) == spec.trainable, one
    for one in sae.unit_rows:
        spec = sae.specs()["params"][one]
        assert spec.trainable and len(spec.shape) == 2
        for params in (start, reference):
            np.testing.assert_allclose(np.linalg.norm(params[one], axis=1), 1, rtol=1e-5)
    assert "aux_served" not in history[0] or max(m["aux_served"] for m in history) > 0
    for config in meshes:
        strategy = config.strategy
        params, history = toy.fit(sae, made, optim, make_mesh(config), 20, strategy=strategy)
        losses = [m["loss"] for m in history]
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(config))
        for one in reference:
            np.testing.assert_allclose(params[one], reference[one], atol=2e-4, err_msg=one)


def test_gradients_match_finite_differences(sae, params):
    """Along random directions, at a point where no latent is about to switch."""
    _, stats = init(sae)
    rows = jax.tree.map(jnp.asarray, batch(sae, 6, 8))

    @jax.jit
    def loss(params):
        hyper = {k: jnp.float32(v) for k, v in {**sae.hyper(), "steps": 10**6}.items()}
        return sae.loss(params, stats, rows, jax.random.key(1), jnp.int32(10**6), hyper)[0]

    grads = jax.grad(loss)(params)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        if name not in params or name in HELD.get(type(sae), ()):
            continue
        direction = np.random.default_rng(1).normal(size=params[name].shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        slope = float(np.sum(grads[name] * direction))
        found, right = [], []
        for step in (1e-3, 1e-4):  # within the larger a latent may switch
            up, down = (loss({**params, name: params[name] + s * direction}) for s in (step, -step))
            found.append((float(up) - float(down)) / (2 * step))
            rounding = float(jnp.spacing(up)) / step
            right.append(abs(found[-1] - slope) < 2e-3 + 0.05 * abs(slope) + rounding)
        assert any(right), (name, slope, found)
