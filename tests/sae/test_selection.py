"""Selection over a batch and above thresholds: the dense definition on every mesh, or a no."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.encode_topk import encode_topk, pre_activations
from saex.sae import ops, selection
from saex.sharding import MeshConfig, make_mesh

B, D, N = 32, 8, 64
MESHES = [MeshConfig(), MeshConfig(8, 1), MeshConfig(2, 4), MeshConfig(1, 8)]
WEIGHTS = ("x", "b_dec", "W_enc", "b_enc", "W_dec")
SPECS = dict(zip(WEIGHTS, (jax.P("data"), jax.P(), jax.P("model"), jax.P("model"), jax.P("model"))))


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, D), (D,), (N, D), (N,), (N, D))
    return {k: rng.normal(size=s).astype(np.float32) for k, s in zip(WEIGHTS, shapes)}


def scores(a):
    return np.asarray(pre_activations(*(jnp.asarray(a[k]) for k in WEIGHTS[:4])))


def on(config, fn, arrays, out):
    """``fn`` of each device's part of the arrays, by name."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        placed = {
            k: jax.device_put(v, jax.NamedSharding(mesh, SPECS[k])) for k, v in arrays.items()
        }
        mapped = jax.shard_map(fn, in_specs=({k: SPECS[k] for k in arrays},), out_specs=out)
        return jax.device_get(jax.jit(mapped)(placed))


def dense(values, indices, a):
    codes = jnp.zeros((values.shape[0], a["W_enc"].shape[0]))
    return codes.at[jnp.arange(values.shape[0])[:, None], indices].add(values)


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_top_of_a_batch_is_that_of_the_flat_scores(config, k):
    def part(a):
        values, indices = encode_topk(*ops.own(tuple(a[name] for name in WEIGHTS[:4])), 8)
        n = a["W_enc"].shape[0]
        values, cut, exact = selection.top_of_batch(jax.nn.relu(values), n, B * k)
        return dense(values, indices, a), cut, exact

    a = arrays()
    f, cut, exact = on(config, part, a, (jax.P("data", "model"), jax.P(), jax.P()))
    p = np.maximum(scores(a), 0)
    wanted = np.sort(p, axis=None)[-B * k]
    if exact:
        np.testing.assert_allclose(cut, wanted, rtol=1e-5)
        np.testing.assert_allclose(f, np.where(p >= wanted, p, 0), atol=1e-5)
        assert (f > 0).sum() == B * k
    fits = ((p >= wanted).reshape(B, config.model, -1).sum(2) < min(8, N // config.model)).all()
    assert bool(exact) == (fits or config.model == 8)


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_above_gives_the_support_of_a_jump_relu(config):
    threshold = np.random.default_rng(3).uniform(2, 5, N).astype(np.float32)

    def part(a, margin):
        first = ops.latents_offset(a["W_enc"].shape[0])
        own = jax.lax.dynamic_slice_in_dim(jnp.asarray(threshold), first, a["W_enc"].shape[0])
        weights = tuple(a[name] for name in WEIGHTS[:4])
        p, indices, active, exact = selection.above(*weights, ops.own(own), 8, margin)
        return dense(jnp.where(active, p, 0), indices, a), exact

    out = (jax.P("data", "model"), jax.P())
    a = arrays()
    p = scores(a)
    for margin in (0.0, 0.5, 50.0):
        f, exact = on(config, functools.partial(part, margin=margin), a, out)
        near = (p > threshold - margin).reshape(B, config.model, -1).sum(2)
        assert bool(exact) == ((near < 8).all() or config.model == 8)
        if exact:
            np.testing.assert_allclose(f, np.where(p > threshold, p, 0), atol=1e-5)


def test_a_cut_is_0_where_too_few_are_above_0_and_ties_are_all_kept():
    values = jnp.asarray([[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, -1.0, -2.0]])
    assert [float(selection.batch_cut(values, t)) for t in (1, 2, 3, 5, 6)] == [3, 2, 1, 1, 0]
    kept, _, _ = selection.top_of_batch(values, 4, 3)
    np.testing.assert_array_equal(kept, [[3, 1, 1, 0], [2, 1, 0, 0]])


@pytest.mark.parametrize("exact", [True, False])
def test_exactly_takes_one_way_with_its_gradients(exact):
    def sparse(w):
        return jnp.sum(w["a"] ** 2), {"which": jnp.float32(1)}

    def other(w):
        return jnp.sum(w["a"] ** 3), {"which": jnp.float32(2)}

    w = {"a": jnp.arange(3.0)}

    @jax.jit
    def run(w, exact):
        def loss(w):
            value, aux = selection.exactly(exact, sparse, other, w)
            return 2 * value, aux

        return jax.value_and_grad(loss, has_aux=True)(w)

    (value, aux), grads = run(w, jnp.bool_(exact))
    assert (float(value), float(aux["which"])) == ((10, 1) if exact else (18, 2))
    np.testing.assert_allclose(grads["a"], [0, 4, 8] if exact else [0, 6, 24])


def test_candidates_are_as_asked_or_where_they_pay():
    assert selection.candidates(5, 8, 4, 10) == 4 and selection.candidates(0, 8, 4096, 10) == 0
    assert selection.candidates(None, 8, 80, 10) == 8 and selection.candidates(None, 8, 79, 10) == 0
