"""encode_topk: every backend against numpy, in values, gradients, memory and what is not finite."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saex.kernels.encode_topk import IMPLS, cases, chosen_scores, encode_topk, pre_activations
from saex.kernels.topk import cpu
from saex.sae import TopK
from saex.sharding import MeshConfig
from tests import compiled
from tests.kernels import oracles
from tests.kernels.oracles import normal, runs_here, whole_numbers

encode = jax.jit(encode_topk, static_argnums=(4, 5, 6))


def shapes(b, d, n):
    return (b, d), (d,), (n, d), (n,)


def scores(x, b_pre, W_enc, b_enc):
    return (np.float64(x) - np.float64(b_pre)) @ np.float64(W_enc).T + np.float64(b_enc)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
@pytest.mark.parametrize("case", sorted(cases.SMALL))
def test_encode_topk_selects_from_the_dense_scores(impl, case):
    b, d, n, k = cases.SMALL[case]
    args = whole_numbers(1, *shapes(b, d, n))
    expected, order = oracles.top_k(scores(*args), k)
    values, indices = encode(*args, k, "bfloat16", impl)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("impl", runs_here(IMPLS, but=["reference"]))
@settings(max_examples=3, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 700), st.integers(1, 9), st.integers())
def test_encode_topk_of_drawn_shapes(impl, b, d, n, k, seed):
    args, k = whole_numbers(abs(seed), *shapes(b, d, n)), min(k, n)
    expected, order = oracles.top_k(scores(*args), k)
    values, indices = encode(*args, k, "float32", impl)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
def test_encode_topk_has_the_gradients_of_the_dense_form(impl):
    b, d, n, k = 5, 6, 40, 3
    args = normal(1, *shapes(b, d, n))
    rng = np.random.default_rng(2)
    dvalues = rng.normal(size=(b, k)).astype(np.float32)
    (_, indices), pull = jax.vjp(lambda *a: encode_topk(*a, k, "float32", impl), *args)
    got = pull((jnp.asarray(dvalues), np.zeros(indices.shape, jax.dtypes.float0)))
    dp = oracles.dense(dvalues, np.asarray(indices), n)
    x, b_pre, W_enc, _ = map(np.float64, args)
    wanted = dp @ W_enc, -(dp @ W_enc).sum(0), dp.T @ (x - b_pre), dp.sum(0)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
def test_bf16_inputs_choose_nearly_the_same(impl):
    args = normal(3, *shapes(64, 32, 1024))
    expected, order = oracles.top_k(scores(*args), 8)
    values, indices = encode(*args, 8, "bfloat16", impl)
    assert values.dtype == jnp.float32
    off = np.abs(values - expected)
    assert off.max() < 0.2 and np.quantile(off, 0.9) < 0.06 and np.quantile(off, 0.5) < 0.02
    same = [len(set(a) & set(b)) / 8 for a, b in zip(np.asarray(indices), order)]
    assert 0.95 < np.mean(same) < 1  # not the float32 form


def test_bf16_matmul_inputs_keep_float32_results_close():
    x, W = normal(2, (64, 32), (16, 32))
    p = pre_activations(x, jnp.zeros(32), W, jnp.zeros(16), "bfloat16")
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(p, x @ W.T, atol=0.2)
    assert np.quantile(np.abs(p - x @ W.T), 0.9) < 0.05


@pytest.fixture
def network(monkeypatch):
    """The CPU's network selects, however small the input; returns how often it was traced."""
    uses, largest = [], cpu.largest
    monkeypatch.setattr(cpu, "SCORES", 1)
    monkeypatch.setattr(cpu, "largest", lambda *args: uses.append(1) or largest(*args))
    return uses


NETWORK = {"k = n": (3, 5, 16, 16), "ties": (5, 2, 48, 6), "two levels": (7, 6, 1024, 9)}
NETWORK |= {"one": (3, 4, 608, 1), "many slots": (2, 4, 2048, 100)}
NETWORK |= {"ragged": (7, 6, 1019, 9), "ragged, k = n": (3, 5, 17, 17)}


@pytest.mark.parametrize("case", NETWORK)
def test_the_network_selects_from_the_dense_scores(case, network):
    """And the gradient goes where it selected."""
    b, d, n, k = NETWORK[case]
    args = whole_numbers(7, *shapes(b, d, n))
    expected, order = oracles.top_k(scores(*args), k)

    def summed(*args):
        chosen = encode_topk(*args, k, "bfloat16", "cpu")
        return jnp.sum(chosen[0]), chosen

    grads, (values, indices) = jax.jit(jax.grad(summed, (2, 3), has_aux=True))(*args)
    assert network
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, expected)
    times = np.bincount(order.ravel(), minlength=n)
    np.testing.assert_array_equal(grads[1], times)
    chosen = oracles.dense(np.ones((b, k)), order, n)
    np.testing.assert_array_equal(grads[0], chosen.T @ (args[0] - args[1][None]))


@pytest.mark.parametrize("n", [1024, 1019])
def test_the_network_puts_what_is_not_finite_in_its_place(n, network):
    args = not_finite(5, 6, n)
    with np.errstate(invalid="ignore"):
        expected, order = oracles.top_k(scores(*args), 4)
    values, indices = jax.jit(lambda *args: encode_topk(*args, 4, "float32", "cpu"))(*args)
    assert network
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, expected)


def not_finite(b, d, n):
    """Rows with NaN, with infinity (NaN where the weight is 0), and a latent whose row is NaN."""
    x, b_pre, W_enc, b_enc = whole_numbers(4, *shapes(b, d, n))
    x = x.at[0, 1].set(jnp.nan).at[1, 0].set(jnp.inf).at[2, 0].set(-jnp.inf)
    W_enc = jnp.where(jnp.arange(d)[None] == 0, jnp.maximum(jnp.abs(W_enc), 1), W_enc)
    W_enc = W_enc.at[n - 3, 0].set(0).at[n // 2].set(oracles.NAN[1])
    return x, b_pre, W_enc, b_enc


@pytest.mark.parametrize("impl", runs_here(IMPLS))
@pytest.mark.parametrize("n", [1024, 1999, 40])
def test_what_is_not_finite_has_its_place(impl, n):
    args = not_finite(5, 6, n)
    with np.errstate(invalid="ignore"):
        p = scores(*args)
    assert np.isnan(p[0]).all() and np.isposinf(p[1]).sum() == n - 2 == np.isneginf(p[2]).sum()
    expected, order = oracles.top_k(p, 4)
    values, indices = encode(*args, 4, "float32", impl)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
@pytest.mark.parametrize("n", [80, 40])
def test_gradients_where_something_is_not_finite(impl, n):
    """It shows in its own latents' gradients; where sums are differences, in others' too, and where
    they are products of matrices, as those of few latents on a CPU.
    """
    x, b_pre, W_enc, b_enc = not_finite(5, 6, n)
    dvalues = normal(3, (5, 4))[0]

    def through(f):
        return jax.grad(lambda W, b: jnp.sum(dvalues * f(W, b)), argnums=(0, 1))(W_enc, b_enc)

    found = through(lambda W, b: encode_topk(x, b_pre, W, b, 4, "float32", impl)[0])
    _, order = encode_topk(x, b_pre, W_enc, b_enc, 4, "float32", impl)
    slots = [(np.asarray(order)[i, j], i, float(dvalues[i, j])) for i in range(5) for j in range(4)]
    dW, db = np.zeros((n, 6)), np.zeros(n)
    with np.errstate(invalid="ignore"):
        for latent, row, dv in slots:
            dW[latent] += dv * (np.asarray(x)[row] - np.asarray(b_pre))
            db[latent] += dv
    for one, other in zip(found, (dW, db)):
        assert not np.isfinite(one[~np.isfinite(other)]).any()
        if impl != "gpu" and (impl, n) != ("cpu", 40):
            right = np.isfinite(other)
            np.testing.assert_allclose(one[right], other[right], rtol=1e-5, atol=1e-5)
    assert 0 < np.isnan(dW).any(axis=1).sum() < n > np.isinf(dW).any(axis=1).sum() > 0


@pytest.mark.parametrize("b, rows", [(1, 1), (1024, 1024), (4096, 1024), (1500, 750), (1025, 513)])
def test_blocks_of_rows_are_few_and_equal(b, rows):
    assert cpu.block_rows(b) == rows


@pytest.mark.parametrize("b", [32, 23, 17])
def test_blocks_of_rows_change_nothing(b, monkeypatch):
    monkeypatch.setattr(cpu, "ROWS", 16)
    assert cpu.block_rows(b) < b
    args = whole_numbers(5, *shapes(b, 4, 32))
    expected, order = oracles.top_k(scores(*args), 3)
    values, indices = jax.jit(IMPLS["cpu"], static_argnums=4)(*args, 3)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(indices, order)


@pytest.mark.parametrize("k, impl, said", [(0, None, "k=0 of n=8"), (2, "cuda", "choose from")])
def test_what_cannot_be_is_refused(k, impl, said):
    with pytest.raises(ValueError, match=said):
        encode_topk(*normal(0, *shapes(2, 3, 8)), k, "float32", impl)


def test_chosen_scores_lead_to_the_encoder():
    args = normal(6, *shapes(5, 6, 40))
    values, indices = encode_topk(*args, 3)

    def through(f):
        return jax.grad(lambda args: jnp.sum(jnp.sin(f(args))))(args)

    got = through(lambda args: chosen_scores(*args, values, indices, jnp.arange(5)))
    want = through(lambda args: jnp.take_along_axis(pre_activations(*args), indices, axis=1))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ [b, n] is not held


def materialised(program, n):
    """Lines of the compiled text that write an array of some rows by ``n`` latents, by rows."""
    found, fused = {}, False
    for line in program.as_text().splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%([\w.\-]+) \(", line)):
            fused = head[2].startswith("fused_computation")
        made = re.match(rf" +(ROOT )?%[\w.\-]+ = \w+\[(\d+),{n}\]\S* ([\w\-]+)\(", line)
        if made and not fused and made[3] not in ("parameter", "get-tuple-element", "bitcast"):
            found.setdefault(int(made[2]), []).append(line.strip())
    return found


@pytest.mark.parametrize(
    "b, n, dtype, writes",
    [
        (2048, 4096, "float32", 1),
        (2048, 4096, "bfloat16", 1),
        (2048, 2040, "float32", 1),
    ],
)
def test_a_step_holds_the_scores_of_one_block_once(b, n, dtype, writes):
    sae = TopK(64, n, 16, matmul_dtype=dtype, aux_coefficient=0.0)
    program, held = compiled.train_step(sae, b, MeshConfig()), n + -n % cpu.GROUP
    found = materialised(program, held)
    assert held == n or not any(rows >= 256 for rows in materialised(program, n))
    found = {rows: lines for rows, lines in found.items() if rows >= 256}  # [d, n] is no score
    assert {rows: len(lines) for rows, lines in found.items()} == {cpu.block_rows(b): writes}


@pytest.mark.parametrize("b, n", [(2048, 4096), (2048, 2040), (1500, 4096)])
def test_encode_topk_needs_room_for_one_block_of_scores(b, n):
    d, k = 64, 16
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes(b, d, n)]
    program = encode.lower(*args, k, "float32", "cpu").compile()
    held = program.memory_analysis().temp_size_in_bytes
    assert 1 <= held / (4 * cpu.block_rows(b) * n) < 1.4
    program = jax.jit(lambda *a: jnp.sort(pre_activations(*a))[:, :k]).lower(*args).compile()
    assert len(materialised(program, n)[b]) > 1  # and the check can fail
