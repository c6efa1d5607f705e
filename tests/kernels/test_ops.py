"""The sparse products and their gradients: every backend against dense products in numpy."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saex.kernels import sparse_affine as sa
from saex.kernels import sparse_decode as sd
from saex.kernels.encode_topk import pre_activations
from saex.kernels.sparse_affine.dead import BLOCKS, CUTS, cut, listed
from saex.kernels.sparse_affine.dead import decode as decode_dead
from saex.kernels.sparse_decode import cases as decode_cases
from tests.kernels import oracles
from tests.kernels.oracles import drawn_slots, normal, runs_here


def sparse(case, seed=0):
    b, d, n, k = decode_cases.SMALL[case]
    values, indices = drawn_slots(b, n, k, seed)
    values = values.at[:, k // 2].set(0)  # an unused slot in every row
    return values, indices, *normal(seed, (n, d), (b, d))


def close(got, want, atol=1e-5):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("impl", runs_here(sd.DECODE))
@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_sparse_decode_and_its_gradients_equal_the_dense_product(impl, case):
    values, indices, rows, g = sparse(case)
    codes = oracles.dense(values, indices, len(rows))
    y, pull = jax.vjp(lambda v, w: sd.sparse_decode(v, indices, w, impl), values, rows)
    dv = np.take_along_axis(np.float64(g) @ np.float64(rows).T, np.asarray(indices), axis=1)
    close((y, *pull(g)), (codes @ rows, dv, codes.T @ g), atol=5e-5)


@pytest.mark.parametrize("rows", [7, 8])
def test_products_of_few_latents_by_blocks_of_rows(monkeypatch, rows):
    monkeypatch.setattr(sd.cpu, "block_rows", lambda b: rows)
    values, indices, W, g = sparse("crowded")
    dvalues, x = normal(4, values.shape, (len(g), 5))
    got = jax.jit(lambda *args: sa.GRADS["cpu"](*args))(values, dvalues, indices, g, x, W)
    close(got, oracles.affine_grads(values, dvalues, indices, g, x, W), atol=2e-4)


DRAWN = st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.integers(1, 12), st.integers()


@pytest.mark.parametrize("impl", runs_here(sa.GRADS, but=["reference"]))
@settings(max_examples=3, deadline=None)
@given(*DRAWN)
def test_sparse_products_of_drawn_shapes(impl, b, d, n, k, seed):
    values, indices = drawn_slots(b, n, min(k, n), abs(seed))
    dvalues, g, x, W = normal(abs(seed), values.shape, (b, d), (b, d + 1), (n, d))
    codes = oracles.dense(values, indices, n)
    got = jax.jit(sd.DECODE[impl])(values, indices, W), sd.sparse_sum(values, indices, n, impl)
    close(got, (codes @ W, codes.sum(0)), atol=5e-5)
    got = jax.jit(sa.GRADS[impl])(values, dvalues, indices, g, x, W)
    close(got, oracles.affine_grads(values, dvalues, indices, g, x, W), atol=2e-4)


@pytest.mark.parametrize("impl", runs_here(sd.SUM))
def test_a_look_up_has_the_gradient_of_indexing(impl):
    _, indices = drawn_slots(30, 7, 3, 1)
    scalars, g = normal(2, (7,), (30, 3))
    out, pull = jax.vjp(lambda a: sd.sparse_take(a, indices, impl), scalars)
    np.testing.assert_array_equal(out, np.asarray(scalars)[np.asarray(indices)])
    np.testing.assert_allclose(pull(g)[0], oracles.dense(g, indices, 7).sum(0), atol=1e-5)
    rows, g = normal(3, (7, 5), (30, 3, 5))
    out, pull = jax.vjp(lambda a: sd.sparse_take(a, indices, impl), rows)
    np.testing.assert_array_equal(out, np.asarray(rows)[np.asarray(indices)])
    columns = [oracles.dense(g[..., c], indices, 7).sum(0) for c in range(5)]
    np.testing.assert_allclose(pull(g)[0], np.stack(columns, axis=1), atol=1e-5)


@pytest.mark.parametrize("impl", runs_here(sd.DECODE))
def test_what_is_not_finite_shows_where_it_was_used(impl):
    rows = normal(3, (9, 4))[0].at[5].set(jnp.inf).at[6].set(jnp.nan)
    indices = jnp.int32([[0, 5], [1, 6], [2, 3], [4, 0]])
    values = jnp.float32([[1, 2], [1, 1], [jnp.nan, 1], [1, 0]])
    y = np.asarray(sd.sparse_decode(values, indices, rows, impl))
    assert np.isposinf(y[0]).all() and np.isnan(y[1:3]).all()
    np.testing.assert_allclose(y[3], rows[4])


def affine_case(case, seed=0):
    """x, b_pre, W_enc, b_enc, W_dec, values, indices: codes are the positive ones of a top k."""
    b, d, n, k = decode_cases.SMALL[case]
    rng = np.random.default_rng(seed)
    shapes = ((b, d), (d,), (n, d), (n,), (n, d + 1))
    x, b_pre, W_enc, b_enc, W_dec = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    values, indices = jax.lax.top_k(pre_activations(x, b_pre, W_enc, b_enc), k)
    values = jnp.maximum(values, 0)
    return x, b_pre, W_enc, b_enc, W_dec, values, jnp.where(values > 0, indices, 0)


@pytest.mark.parametrize("impl", runs_here(sa.GRADS))
@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_sparse_affine_has_the_gradients_of_the_dense_form(impl, case):
    *weights, values, indices = affine_case(case)
    rng = np.random.default_rng(1)
    a, c = rng.normal(size=values.shape), rng.normal(size=(values.shape[0], weights[4].shape[1]))

    @jax.jit
    def loss(*weights):
        v, y = sa.sparse_affine(*weights, values, indices, impl)
        return jnp.sum(jnp.sin(v) * a) + jnp.sum(jnp.cos(y) * c)

    x, b_pre, W_enc, _, W_dec = map(np.float64, weights)
    v, where = np.float64(values), np.asarray(indices)
    y = oracles.dense(v, where, len(W_dec)) @ W_dec
    got, grads = jax.value_and_grad(loss, argnums=range(5))(*weights)
    np.testing.assert_allclose(got, np.sum(np.sin(v) * a) + np.sum(np.cos(y) * c), rtol=1e-5)
    through = np.cos(v) * a, -np.sin(y) * c
    dW_dec, dW_enc, db_enc = oracles.affine_grads(
        v, through[0], where, through[1], x - b_pre, W_dec
    )
    dv = through[0] + np.take_along_axis(through[1] @ W_dec.T, where, axis=1)
    dx = oracles.dense(np.where(v != 0, dv, 0), where, len(W_enc)) @ W_enc
    wanted = dx, -dx.sum(0), dW_enc, db_enc, dW_dec
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_named_backend_is_that_one_in_all_its_parts(monkeypatch):
    """What an op calls beneath itself is of the same name: no other backend is even there."""
    for table in (sd.DECODE, sd.DOTS, sd.SCATTER, sd.SUM, sa.GRADS):
        for name in set(table) - {"reference"}:
            monkeypatch.delitem(table, name)
    *weights, values, indices = affine_case("few")

    def loss(*weights):
        return jnp.sum(sa.sparse_affine(*weights, values, indices, "reference")[1])

    jax.eval_shape(jax.grad(loss, argnums=range(5)), *weights)
    with pytest.raises(ValueError, match="choose from"):
        sa.sparse_affine(*weights, values, indices, "cpu")


def aux_case(b=6, d=5, n=24, k=3, seed=7):
    """Weights, slots, dead latents (some of them in use as well) and a cut for each row."""
    weights = normal(seed, (b, d), (d,), (n, d), (n,), (n, d + 1))
    values, indices = drawn_slots(b, n, k, seed + 1)
    dead = np.random.default_rng(seed + 2).random(n) < 0.5
    cut = np.resize(np.float32([0, 0.5, 1, 2, 9, 0]), (b, 1))
    return weights, values, indices, dead, jnp.asarray(cut)


def dense_aux(weights, values, indices, dead, cut, through):
    """``aux_of`` in numpy: ((y, y_dead, active), (db_pre, dW_enc, db_enc, dW_dec))."""
    x, b_pre, W_enc, b_enc, W_dec = map(np.float64, weights)
    cut = np.asarray(cut)
    dvalues, g, g_dead = map(np.float64, through)
    p = (x - b_pre) @ W_enc.T + b_enc
    f = np.where(dead & (p >= cut) & (p > 0), p, 0)
    out = oracles.dense(values, indices, len(W_dec)) @ W_dec, f @ W_dec, (f > 0).sum(0)
    dec, enc, bias = oracles.affine_grads(values, dvalues, indices, g, x - b_pre, W_dec)
    dz = np.where(f > 0, g_dead @ W_dec.T, 0)
    bias = bias + dz.sum(0)
    return out, (-(bias @ W_enc), enc + dz.T @ (x - b_pre), bias, dec + f.T @ g_dead)


def aux_of(impl, weights, values, indices, dead, cut, through):
    """The same by the op."""

    def op(weights):
        args = (*weights, values, indices, listed(jnp.asarray(dead)), cut)
        return sa.sparse_affine_aux(*args, "float32", impl)

    (_, *out), pull = jax.vjp(op, weights)
    zero = np.zeros(dead.shape, jax.dtypes.float0)
    return out, pull((*through, zero))[0][1:]  # x is held


@pytest.mark.parametrize("impl", runs_here(sa.GRADS))
def test_dead_latents_beside_the_living_equal_dense_products(impl, monkeypatch):
    monkeypatch.setitem(BLOCKS, "cpu", 5)
    args = aux_case()
    through = normal(10, args[1].shape, (6, 6), (6, 6))
    (out, grads), (wanted, expected) = aux_of(impl, *args, through), dense_aux(*args, through)
    close(out, wanted, atol=1e-4)
    close(grads, expected, atol=1e-4)


@pytest.mark.parametrize("impl", runs_here(sa.GRADS, but=["reference"]))
@settings(max_examples=3, deadline=None)
@given(*(st.integers(1, most) for most in (9, 12, 60, 5)), st.integers(0, 2**31))
def test_dead_latents_of_drawn_shapes(impl, b, d, n, k, seed):
    args = aux_case(b, d, n, min(k, n), seed)
    through = normal(seed + 3, args[1].shape, (b, d + 1), (b, d + 1))
    with mock.patch.dict(BLOCKS, {"cpu": 5}):
        (out, grads), (wanted, expected) = aux_of(impl, *args, through), dense_aux(*args, through)
    close(out, wanted, atol=1e-4)
    close(grads, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", sorted(CUTS))
@pytest.mark.parametrize("n_dead, k", [(40, 7), (64, 1), (40, 40), (3, 7)])
def test_a_cut_is_the_kth_largest_of_the_dead_and_lets_k_of_them_in(
    impl, n_dead, k, dtype, monkeypatch
):
    monkeypatch.setitem(BLOCKS, "cpu", 16)
    monkeypatch.setattr("saex.kernels.sparse_affine.dead.ROWS", 8)
    x, W_enc, b_enc, W_dec = normal(11, (21, 6), (64, 6), (64,), (64, 5))
    dead = np.random.default_rng(12).permutation(64) < n_dead
    of_dead = listed(jnp.asarray(dead))
    got = np.asarray(cut(x, W_enc, b_enc, of_dead, k, dtype, impl))
    p = np.asarray(pre_activations(x, jnp.zeros(6), W_enc, b_enc, dtype))
    p = np.sort(np.where(dead, np.maximum(p, 0), 0), axis=1)
    np.testing.assert_allclose(got[:, 0], p[:, -k], rtol=1e-5)
    _, active = decode_dead(x, W_enc, b_enc, W_dec, of_dead, jnp.asarray(got), dtype)
    assert int(active.sum()) == np.minimum((p > 0).sum(1), k).sum()  # to the last bit


@pytest.mark.parametrize("impl", sorted(CUTS))
def test_dead_latents_equal_at_the_cut_are_all_let_in(impl):
    x, W_enc = jnp.ones((2, 3)), jnp.repeat(jnp.float32([[1], [2], [2], [3]]), 3, axis=1)
    of_dead, b_enc = listed(jnp.ones(4, bool)), jnp.zeros(4)
    got = cut(x, W_enc, b_enc, of_dead, 2, "float32", impl)
    np.testing.assert_array_equal(got, [[6], [6]])
    _, active = decode_dead(x, W_enc, b_enc, W_enc, of_dead, got, "float32")
    np.testing.assert_array_equal(active, [0, 2, 2, 2])
