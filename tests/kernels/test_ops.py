"""Every backend equals the reference in values and gradients; the reference equals numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saex.kernels import sparse_affine as sa
from saex.kernels import sparse_decode as sd
from saex.kernels.encode_topk import encode_topk, pre_activations
from saex.kernels.sparse_decode import cases as decode_cases
from saex.kernels.topk import IMPLS, cases, top_k
from saex.sae.base import SparseCodes


def runs_here(impls):
    """The backends that XLA compiles for any platform; Pallas' have tests of their own."""
    names = sorted(name for name in impls if name != "tpu" and not name.startswith("pallas"))
    return [pytest.param(n, marks=pytest.mark.interpreted if n == "gpu" else []) for n in names]


def oracle(scores, k):
    """Largest first, the lowest index among equals: a stable sort of the negated scores."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=-1), order


def random_scores(kind, b, n, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(0, 3, (b, n)).astype(np.float32)
    if kind == "relu":
        return np.maximum(rng.normal(size=(b, n)) - 2, 0).astype(np.float32)
    if kind == "zeros":
        return np.zeros((b, n), np.float32)
    if kind == "-inf":
        return np.where(rng.random((b, n)) < 0.9, -np.inf, 1.0).astype(np.float32)
    return rng.normal(size=(b, n)).astype(np.float32)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
@pytest.mark.parametrize("case", sorted(cases.SMALL))
def test_top_k_is_exact_with_ties_to_the_lowest_index(impl, case):
    b, n, k = cases.SMALL[case]
    kinds = ("normal", "ties", "relu", "zeros", "-inf")
    scores = np.concatenate([random_scores(kind, b, n) for kind in kinds])
    values, indices = jax.jit(top_k, static_argnums=(1, 2))(scores, k, impl)
    expected, order = oracle(scores, k)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(indices, order)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 32), st.integers(0, 2**31))
def test_top_k_backends_agree_on_drawn_shapes(b, groups, k, seed):
    n = 16 * groups
    scores = jnp.asarray(random_scores("ties", b, n, seed))
    k = min(k, n)
    for got, want in zip(top_k(scores, k, "cpu"), top_k(scores, k, "reference")):
        np.testing.assert_array_equal(got, want)


def test_top_k_gradient_goes_to_the_chosen_entries():
    scores = jnp.asarray(random_scores("normal", 3, 64))
    gradient = jax.grad(lambda s: jnp.sum(top_k(s, 4)[0] * 2.0))(scores)
    expected = np.zeros((3, 64), np.float32)
    np.put_along_axis(expected, oracle(np.asarray(scores), 4)[1], 2.0, axis=1)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("k", [0, 9])
def test_top_k_refuses_a_k_that_is_not_in_range(k):
    with pytest.raises(ValueError, match=f"k={k} of n=8"):
        top_k(jnp.zeros((2, 8)), k)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="choose from"):
        top_k(jnp.zeros((2, 8)), 2, "cuda")


def test_cpu_top_k_compiles_to_no_sort_of_the_scores():
    lowered = jax.jit(lambda s: top_k(s, 4, "cpu")[0][:, :2]).lower(jnp.zeros((8, 1024)))
    text = lowered.compile().as_text()
    assert "TopK" in text
    assert not [line for line in text.splitlines() if " sort(" in line and "1024" in line]


def sparse(case, seed=0):
    b, d, n, k = decode_cases.SMALL[case]
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(n)[:k] for _ in range(b)]).astype(np.int32)
    values = rng.normal(size=(b, k)).astype(np.float32)
    values[:, k // 2] = 0  # an unused slot
    rows, g = (rng.normal(size=s).astype(np.float32) for s in ((n, d), (b, d)))
    return tuple(map(jnp.asarray, (values, indices, rows, g)))


@pytest.mark.parametrize("impl", runs_here(sd.DECODE))
@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_sparse_decode_and_its_gradients_equal_the_dense_product(impl, case):
    values, indices, rows, g = sparse(case)
    dense = np.zeros((values.shape[0], rows.shape[0]))
    np.put_along_axis(dense, indices, values, axis=1)
    y, pull = jax.vjp(lambda v, w: sd.sparse_decode(v, indices, w, impl), values, rows)
    dv, dw = pull(g)
    np.testing.assert_allclose(y, dense @ rows, atol=1e-5)
    np.testing.assert_allclose(dw, dense.T @ g, atol=1e-5)
    np.testing.assert_allclose(dv, np.take_along_axis(g @ rows.T, indices, axis=1), atol=1e-5)


def test_encode_topk_has_the_gradients_of_the_dense_form():
    rng = np.random.default_rng(1)
    shapes = ((5, 6), (6,), (40, 6), (40,))
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]

    def through(encode):
        def f(*args):
            values, indices = encode(*args)
            return jnp.sum(jnp.sin(values) * (1 + indices))

        return jax.grad(f, argnums=(0, 1, 2, 3))(*args)

    sparse_grads = through(lambda *a: encode_topk(*a, 3))
    dense_grads = through(lambda *a: jax.lax.top_k(pre_activations(*a), 3))
    for got, want in zip(sparse_grads, dense_grads):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_bf16_matmul_inputs_keep_float32_results_close():
    rng = np.random.default_rng(2)
    x, W = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 32), (16, 32)))
    p = pre_activations(x, jnp.zeros(32), W, jnp.zeros(16), "bfloat16")
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(p, x @ W.T, atol=0.2)
    assert np.quantile(np.abs(p - x @ W.T), 0.9) < 0.05


def test_blocks_of_rows_change_nothing():
    from saex.kernels.encode_topk import IMPLS, cpu

    rng = np.random.default_rng(3)
    shapes = ((2 * cpu.ROWS, 4), (4,), (32, 4), (32,))
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    (values, indices), (wanted, order) = (
        jax.jit(f, static_argnums=4)(*args, 3) for f in (IMPLS["cpu"], IMPLS["reference"])
    )
    np.testing.assert_allclose(values, wanted, rtol=1e-6)
    np.testing.assert_array_equal(indices, order)


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

    def loss(v, y):
        return jnp.sum(jnp.sin(v) * a) + jnp.sum(jnp.cos(y) * c)

    def sparse_loss(*weights):
        return loss(*sa.sparse_affine(*weights, values, indices, impl))

    def dense_loss(x, b_pre, W_enc, b_enc, W_dec):
        p = pre_activations(x, b_pre, W_enc, b_enc)
        v = jnp.where(values != 0, jnp.take_along_axis(p, indices, axis=1), 0)
        return loss(v, SparseCodes(v, indices).dense(p.shape[1]) @ W_dec)

    got, got_grads = jax.value_and_grad(sparse_loss, argnums=range(5))(*weights)
    want, want_grads = jax.value_and_grad(dense_loss, argnums=range(5))(*weights)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for one, other in zip(got_grads, want_grads):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
