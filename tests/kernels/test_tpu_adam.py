"""The TPU kernel of the optimiser, interpreted as those in test_tpu.py are."""

import jax
import jax.numpy as jnp
import pytest

from saex.kernels.adam import Scalars
from saex.kernels.adam import cases as adam_cases
from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.adam import reference as adam_ref
from saex.sae import ops
from saex.sharding import MeshConfig, make_mesh
from tests.kernels.test_tpu import close, interpreted, normal, small_tiles  # noqa: F401

pytestmark = pytest.mark.interpreted


def adam_args(n, d):
    rows, g, mu = normal(n, (n, d), (n, d), (n, d))
    scalars = Scalars(*map(jnp.float32, (0.1, 0.2, 0.003, 0.7)))
    return adam_ref.unit_rows(rows), g, mu, mu * mu, scalars, (0.9, 0.999), 1e-8


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("case", adam_cases.SMALL)
def test_adam(case, unit):
    args = adam_args(*adam_cases.SMALL[case])
    close(interpreted(adam_tpu.adam, *args, unit), adam_ref.adam(*args, unit), atol=1e-4)


def test_a_factor_of_nothing_takes_nothing():
    rows, _, mu, nu, scalars, *rest = adam_args(16, 128)
    args = rows, mu * jnp.nan, mu, nu, scalars._replace(factor=jnp.float32(0)), *rest
    got, want = interpreted(adam_tpu.adam, *args, True), adam_ref.adam(*args, True)
    close(got[:3], want[:3], atol=1e-4)
    assert all(jnp.isfinite(a).all() for a in got[:3])


def test_sums_over_rows_beyond_the_matrix_are_found_out(monkeypatch):
    plain = adam_tpu._kernel
    monkeypatch.setattr(adam_tpu, "_kernel", lambda n, *args: plain(n + 8, *args))
    args = adam_args(*adam_cases.SMALL["ragged"])
    with pytest.raises(AssertionError):
        close(interpreted(adam_tpu.adam, *args, True), adam_ref.adam(*args, True), atol=1e-4)


def test_adam_on_a_mesh_that_splits_latents():
    mesh = make_mesh(MeshConfig(2, 2))
    args = adam_args(32, 40)
    where = jax.NamedSharding(mesh, jax.P("model"))
    with jax.set_mesh(mesh):
        arrays = tuple(jax.device_put(a, where) for a in args[:4])

        def one(arrays, scalars):
            out = adam_tpu.adam(*arrays, scalars, *args[5:], True)
            return out[:3], out[3:]

        got, sums = interpreted(lambda *a: ops.on_rows(one, *a), arrays, tuple(args[4]))
    close(jax.device_get((*got, *sums)), jax.device_get(adam_ref.adam(*args, True)), atol=1e-4)
