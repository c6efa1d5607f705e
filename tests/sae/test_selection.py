"""Selection over a batch: the dense definition on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.encode_topk import pre_activations
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


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_top_of_a_batch_is_that_of_the_flat_scores(config, k):
    def part(a):
        p = jax.nn.relu(pre_activations(*ops.own(tuple(a[name] for name in WEIGHTS[:4]))))
        cut = selection.batch_cut(B * k, p)
        return jnp.where(p >= cut, p, 0), cut

    a = arrays()
    f, cut = on(config, part, a, (jax.P("data", "model"), jax.P()))
    p = np.maximum(scores(a), 0)
    wanted = np.sort(p, axis=None)[-B * k]
    np.testing.assert_allclose(cut, wanted, rtol=1e-5)
    np.testing.assert_allclose(f, np.where(p >= wanted, p, 0), atol=1e-5)
    assert (f > 0).sum() == B * k


def test_more_scores_than_an_int32_counts(monkeypatch):
    """Counts that could be wrong are passed over by rough ones."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32)
    totals = (1, 7, 200, 500)
    wanted = [float(selection.batch_cut(t, values)) for t in totals]
    monkeypatch.setattr(selection, "COUNTED", 1500)
    assert [float(selection.batch_cut(t, values)) for t in totals] == wanted


def test_a_cut_is_0_where_too_few_are_above_0_and_ties_are_all_kept():
    values = jnp.asarray([[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, -1.0, -2.0]])
    assert [float(selection.batch_cut(t, values)) for t in (1, 2, 3, 5, 6)] == [3, 2, 1, 1, 0]
