"""Scatter-adds over latents on a CPU by sorted slots: exact for any number of slots to a latent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.sparse_affine import cpu as affine
from saex.kernels.sparse_affine import reference
from saex.kernels.sparse_decode import cpu

CASES = {  # rows, slots of each, latents, slots to be sorted at once
    "a slot to a latent": (16, 4, 64, 2**32),
    "several": (40, 3, 30, 2**32),
    "lists with further lines": (300, 4, 8, 2**32),
    "more lines than a block": (5000, 8, 16, 2**32),
    "32 bits, all of them in use": (2**11, 2**5, 2**16, 2**32),
    "in parts, the last not whole": (90, 5, 20, 128),
    "one latent": (7, 2, 1, 2**32),
    "fewer slots than latents": (5, 3, 100, 2**32),
    "too many latents to sort": (2**11, 2**5, 2**16 + 1, 2**32),
}


@pytest.fixture(autouse=True)
def _by_slots(monkeypatch):
    monkeypatch.setattr(cpu, "NARROW", 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_sums_are_exact(name, spread):
    """Of small integers. Popular latents have far more slots than others, some have none."""
    b, k, n, most = CASES[name]
    rng = np.random.default_rng(0)
    indices = (n * rng.random((b, k)) ** spread).astype(np.int32)
    indices[-1] = n - 1
    values, dz = rng.integers(-3, 4, size=(2, b, k)).astype(np.float32)
    g, x = (rng.integers(-4, 5, size=(b, d)).astype(np.float32) for d in (6, 2))
    owner = rng.integers(0, b + 1, size=b).astype(np.int32)  # b: nobody's
    terms = (values, g, owner), (dz, x, np.where(owner < b, owner // 2, b))
    got = jax.jit(cpu._scatters, static_argnums=(2, 3))(terms, indices, n, most)
    used = (values != 0) & (owner < b)[:, None]
    sorts = not name.startswith(("fewer", "too many"))
    for one, (v, rows, whose) in zip(got, terms, strict=True):
        v = np.where(used, v, 0) if sorts else np.where((owner < b)[:, None], v, 0)
        wanted = np.zeros((n, rows.shape[1]), np.float32)
        of = np.minimum(whose, b - 1)
        np.add.at(wanted, indices, v[:, :, None] * rows[of][:, None])
        np.testing.assert_array_equal(one, wanted)


@pytest.mark.parametrize("rows", [0, 8, 64])
@pytest.mark.parametrize("most", [2**32, 64])
def test_lines_at_the_end_may_be_nobody_s(rows, most):
    """Of 64 lines; none in use, some, all."""
    rng = np.random.default_rng(1)
    owner = np.where(np.arange(64) < rows, np.arange(64), 64).astype(np.int32)
    values = rng.integers(1, 4, size=(64, 2)).astype(np.float32)
    indices = rng.integers(0, 12, size=(64, 2)).astype(np.int32)
    g = np.arange(64, dtype=np.float32)[:, None]
    wanted = np.zeros((12, 1), np.float32)
    np.add.at(wanted, indices[:rows], (values * g)[:rows, :, None])
    got = jax.jit(cpu._scatters, static_argnums=(2, 3))([(values, g, owner)], indices, 12, most)
    np.testing.assert_array_equal(got[0], wanted)


def test_no_rows_sum_to_0():
    assert not np.any(cpu.scatter(jnp.ones((0, 2)), jnp.zeros((0, 2), int), jnp.ones((0, 3)), 5))


@pytest.mark.parametrize("n", [16, 200])
def test_the_backward_pass_of_rows_is_that_of_the_definition(n, monkeypatch):
    """By matrix products, and sorted."""
    monkeypatch.undo()
    rng = np.random.default_rng(2)
    values, dvalues = (jnp.asarray(rng.normal(size=(70, 3)), jnp.float32) for _ in range(2))
    values = values.at[::5, 1].set(0)
    indices = jnp.asarray([rng.permutation(n)[:3] for _ in range(70)], jnp.int32)
    g, x, W_dec = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((70, 4), (70, 6), (n, 4)))
    args = values, dvalues, indices, g, x, W_dec
    for one, two in zip(affine.grads(*args), reference.grads(*args), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_slot_that_is_not_in_use_gets_no_row_that_is_not_finite():
    values = jnp.asarray([[1.0, 0.0], [2.0, 3.0]] * 8)
    indices = jnp.asarray([[0, 1], [2, 3]] * 8)
    g = jnp.asarray([[jnp.nan], [1.0]] * 8)
    summed = np.asarray(cpu.scatter(values, indices, g, 6)[:, 0])
    np.testing.assert_array_equal(summed, [np.nan, 0, 16, 24, 0, 0])
