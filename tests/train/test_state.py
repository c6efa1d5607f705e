"""Initial states: equal on all meshes, and where they are large never whole on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, JumpReLU, TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train import state as states
from saex.train.optim import Optim

D, N = 64, 4096
SAE = TopK(D, N, 8)
MESHES = [MeshConfig(1, 8), MeshConfig(2, 4), MeshConfig(8, 1, strategy="fsdp")]
TX = Optim().transformation()


def sample(seed=0):
    x = np.random.default_rng(seed).normal(size=(512, D)).astype(np.float32)
    return {"x": jnp.asarray(x * (1 + np.arange(D) / D).astype(np.float32) + 0.3)}


def fresh(sae, config):
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        made = states.init_state(sae, TX, jax.random.key(3), sample(), mesh, config.strategy)
    return made, mesh


def program(sae, config):
    """The compiled initialisation."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        alone = jax.NamedSharding(mesh, jax.P())
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=alone)
        x = jax.ShapeDtypeStruct((512, D), jnp.float32, sharding=alone)
        init = states.initial(sae, TX, mesh, config.strategy)
        return jax.jit(init).lower(key, {"x": x}).compile().memory_analysis()


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_the_state_is_that_of_one_device(config, whole, monkeypatch):
    want = jax.device_get(fresh(SAE, MeshConfig())[0])
    if not whole:
        monkeypatch.setattr(states, "WHOLE", 0)
    got, mesh = fresh(SAE, config)
    target = states.abstract_state(SAE, TX, mesh, config.strategy)
    laid = jax.tree.map(lambda a, t: a.sharding.is_equivalent_to(t.sharding, a.ndim), got, target)
    assert all(jax.tree.leaves(laid))
    same = np.testing.assert_array_equal if whole else np.testing.assert_allclose
    # drawn from the key alone, and norms of whole rows: the same bits even so
    np.testing.assert_array_equal(got.params["W_dec"], want.params["W_dec"])
    jax.tree.map(same, jax.device_get(got), want)


@pytest.mark.parametrize(
    "sae", [BatchTopK(D, N, 8), JumpReLU(D, N)], ids=lambda s: type(s).__name__
)
def test_thresholds_are_that_of_one_device_to_rounding(sae, monkeypatch):
    want = jax.device_get(fresh(sae, MeshConfig())[0])
    monkeypatch.setattr(states, "WHOLE", 0)
    got = jax.device_get(fresh(sae, MeshConfig(2, 4))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6, atol=1e-9), got, want)


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_no_device_makes_all_of_the_weights(config, monkeypatch):
    sae = JumpReLU(D, 16 * N)  # no probes, which would be as large as W at this width
    W = 4 * D * sae.n
    assert program(sae, config).temp_size_in_bytes > 2 * W  # the control
    monkeypatch.setattr(states, "WHOLE", 0)
    assert program(sae, config).temp_size_in_bytes < W


def test_a_number_of_latents_that_devices_do_not_divide(monkeypatch):
    sae = TopK(D, 36, 8)  # 4 shards of latents, and not 8
    want = jax.device_get(fresh(sae, MeshConfig())[0])
    monkeypatch.setattr(states, "WHOLE", 0)
    got = jax.device_get(fresh(sae, MeshConfig(2, 4))[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, want)
