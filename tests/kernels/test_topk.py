"""top_k: every backend equals a stable sort in numpy, whatever the scores and the shape."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saex.kernels.topk import IMPLS, cases, cpu, network, order, top_k
from tests.kernels import oracles
from tests.kernels.oracles import KINDS, random_scores, runs_here

compiled = jax.jit(top_k, static_argnums=(1, 2))


def equals_the_oracle(got, scores, k):
    for one, other in zip(got, oracles.top_k(scores, k), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("impl", runs_here(IMPLS))
@pytest.mark.parametrize("case", sorted(cases.SMALL))
def test_top_k_is_exact_with_ties_to_the_lowest_index(impl, case):
    b, n, k = cases.SMALL[case]
    scores = np.concatenate([random_scores(kind, b, n) for kind in KINDS])
    equals_the_oracle(compiled(scores, k, impl), scores, k)


@pytest.mark.parametrize("case", sorted(cases.NETWORK))
def test_the_network_is_exact_with_ties_to_the_lowest_index(case):
    b, n, k = cases.NETWORK[case]
    assert cpu.by_network(b, n, k)
    scores = np.concatenate([random_scores(kind, b, n) for kind in KINDS])
    equals_the_oracle(compiled(scores, k, "cpu"), scores, k)


def test_small_and_ragged_scores_are_left_to_xla():
    assert not any(cpu.by_network(*shape) for shape in cases.SMALL.values())
    assert not cpu.by_network(64, 1030, 4)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 0, 0, 1, 15]),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
)
def test_top_k_of_drawn_shapes(b, k, groups, more, kind, seed):
    n = 16 * groups + more  # with more, no multiple of a group
    with mock.patch.multiple(cpu, SCORES=1, ROWS=4):  # rows in blocks, of the last some are no rows
        scores, k = random_scores(kind, b, n, seed), min(k, n)
        got = jax.jit(lambda s: cpu.top_k(s, k))(scores)
    equals_the_oracle(got, scores, k)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_top_k_of_half_precision_by_the_network(dtype):
    scores = jnp.asarray(random_scores("ties", 32, 2048), dtype)
    values, indices = compiled(scores, 8, "cpu")
    assert values.dtype == dtype and cpu.by_network(32, 2048, 8)
    equals_the_oracle((values.astype(jnp.float32), indices), np.asarray(scores, np.float32), 8)


def mutated(monkeypatch, scores, module, name, mutant):
    """The backend is exact on these scores, and with the mutant it is not."""
    monkeypatch.setattr(cpu, "SCORES", 1)
    equals_the_oracle(cpu.top_k(jnp.asarray(scores), 4), scores, 4)
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        equals_the_oracle(cpu.top_k(jnp.asarray(scores), 4), scores, 4)


def test_groups_that_are_not_put_back_in_order_are_found_out(monkeypatch):
    scores = np.zeros((2, 1024), np.float32)  # maxima in another order than groups, ties at the cut
    scores[0, 500], scores[0, 9] = 1, 0.5
    scores[1, 900:] = 1
    mutated(monkeypatch, scores, cpu.jnp, "sort", lambda chosen, axis: chosen)


def test_maxima_that_drop_nan_are_found_out(monkeypatch):
    scores = np.float32(np.random.default_rng(0).normal(size=(8, 1024)))
    scores[np.arange(8), 100 + 16 * np.arange(8) + np.arange(8)] = oracles.NAN[1]
    maxima = lambda s, g: jnp.nanmax(s.reshape(len(s), -1, g), axis=-1)  # noqa: E731
    mutated(monkeypatch, scores, cpu, "group_maxima", maxima)


@pytest.mark.parametrize("step", ["_sorted", "_exchanged"])
def test_a_network_with_a_step_too_few_is_found_out(monkeypatch, step):
    scores = np.float32(np.random.default_rng(0).normal(size=(8, 1024)))
    mutant = {"_sorted": lambda x, half: x, "_exchanged": lambda a, b: [a, b]}[step]
    mutated(monkeypatch, scores, network, step, mutant)


def test_a_network_that_does_not_settle_ties_is_found_out(monkeypatch):
    def turned(keys, indices, *how):  # the highest index first
        keys, indices = network.largest(keys, 2**20 - indices, *how)
        return keys, 2**20 - indices

    mutated(monkeypatch, random_scores("ties", 8, 1024), cpu, "largest", turned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keys_order_like_scores_and_turn_back_into_them(dtype):
    rising = [-np.inf, -2, -1e-7, -0.0, 0, 1e-7, 3, np.inf, oracles.NAN[1], oracles.NAN[0]]
    scores = jnp.asarray(rising, dtype)
    keys = np.asarray(order.key_of(scores)).astype(np.int64)
    steps = [True, True, True, False, True, True, True, True, False]
    np.testing.assert_array_equal(np.diff(keys) > 0, steps)
    assert (np.diff(keys) >= 0).all()
    back = order.score_of(order.key_of(scores), scores.dtype)
    assert back.dtype == scores.dtype
    np.testing.assert_array_equal(back.astype(jnp.float32), scores.astype(jnp.float32))


def test_top_k_gradient_goes_to_the_chosen_entries():
    scores = jnp.asarray(random_scores("normal", 3, 64))
    gradient = jax.grad(lambda s: jnp.sum(top_k(s, 4)[0] * 2.0))(scores)
    expected = np.zeros((3, 64), np.float32)
    np.put_along_axis(expected, oracles.top_k(np.asarray(scores), 4)[1], 2.0, axis=1)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("k", [0, 9])
def test_top_k_refuses_a_k_that_is_not_in_range(k):
    with pytest.raises(ValueError, match=f"k={k} of n=8"):
        top_k(jnp.zeros((2, 8)), k)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="choose from"):
        top_k(jnp.zeros((2, 8)), 2, "cuda")


@pytest.mark.parametrize("b, network", [(8, False), (64, True)])
def test_cpu_top_k_compiles_to_no_sort_of_the_scores(b, network):
    lowered = jax.jit(lambda s: top_k(s, 4, "cpu")[0][:, :2]).lower(jnp.zeros((b, 1024)))
    text = lowered.compile().as_text()
    assert ("TopK" in text) != network
    assert not [line for line in text.splitlines() if " sort(" in line and "1024" in line]
