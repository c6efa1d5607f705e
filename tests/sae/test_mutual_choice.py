"""Mutual Choice against BatchTopK, and the law of densities against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, MutualChoice, SparseCodes, zipf
from tests.sae import toy

D, N, K = 8, 32, 4


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae):
    return sae.init(jax.random.key(0), {"x": jnp.asarray(sample(256))})


def loss_of(sae, params, stats, x, step=0):
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, None, jnp.int32(step), sae.hyper())


def settled(stats, sae, scarce):
    """Stats in which all latents but the scarce ones fire as their law says."""
    law = stats["law"] * 0 + K / sae.n
    density = law.at[jnp.asarray(scarce, int)].mul(0.01)
    return {**stats, "law": law, "density": density, "rows_seen": jnp.float32(10**9)}


def test_it_is_batch_topk_while_densities_are_not_known():
    x = sample()
    ours, other = (cls(D, N, K) for cls in (MutualChoice, BatchTopK))
    params, stats = init(ours)
    same, same_stats = init(other)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    loss, out = loss_of(ours, params, stats, x)
    expected, other_out = loss_of(other, same, same_stats, x)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(out.reconstruction, other_out.reconstruction)
    np.testing.assert_array_equal(out.frozen["threshold"], other_out.frozen["threshold"])


def test_aux_zipf_is_aux_k_of_the_underused():
    """With the scarce latents dead for BatchTopK, both losses and gradients are one."""
    x, scarce = sample(), np.arange(0, N, 5)
    # without the scarce in the selection, so that they are dead after the batch too
    ours = MutualChoice(D, N, K)
    other = BatchTopK(D, N, K, dead_after_tokens=10**6)
    params, stats = init(ours)
    params["b_enc"] = params["b_enc"].at[scarce].add(-0.5)
    dead = {**init(other)[1]}
    dead["since_fired"] = dead["since_fired"].at[scarce].set(10**7)
    stats = settled(stats, ours, scarce)
    (loss, out), grads = jax.value_and_grad(lambda p: loss_of(ours, p, stats, x, 1), has_aux=True)(
        params
    )
    (expected, other_out), same = jax.value_and_grad(
        lambda p: loss_of(other, p, dead, x), has_aux=True
    )(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["aux_zipf"], other_out.metrics["aux_k"], rtol=1e-6)
    np.testing.assert_allclose(out.metrics["underused"], len(scarce) / N, rtol=1e-6)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(grads[name], same[name], atol=1e-6, err_msg=name)


def test_with_none_underused_it_is_0():
    sae, x = MutualChoice(D, N, K), sample()
    params, stats = init(sae)
    out = loss_of(sae, params, settled(stats, sae, []), x, 1)[1]
    assert float(out.metrics["aux_zipf"]) == 0 == float(out.metrics["underused"])


def test_densities_are_counted_and_forgotten():
    stats, shares = zipf.start(4, 1), np.array([[1, 0.5, 0, 0], [0, 0.5, 0, 1], [1, 1, 0, 0]])
    for fires in shares:  # batches of two rows, a memory of four
        on = np.stack([fires >= 0.5, fires >= 1]).astype(np.float32)
        indices = jnp.broadcast_to(jnp.arange(4), (2, 4))
        stats = zipf.count(stats, SparseCodes(jnp.asarray(on), indices), 2, 4)
    mean = (shares[0] + shares[1]) / 2
    np.testing.assert_allclose(stats["density"], (mean + shares[2]) / 2)
    assert float(stats["rows_seen"]) == 6


def test_the_law_is_found_and_its_broken_end_is_not_followed():
    rank = np.arange(1, 201)
    law = 0.3 * (rank + 6.0) ** -1.2
    broken = np.where(rank > 185, 0, law)
    order = np.random.default_rng(0).permutation(200)
    law_of = jax.jit(zipf.law_of)
    found = np.asarray(law_of(jnp.asarray(broken[order], jnp.float32)))
    np.testing.assert_allclose(np.sort(found)[::-1], law, rtol=0.1)
    alive = broken[order] > 0
    np.testing.assert_allclose(found[alive], broken[order][alive], rtol=0.1)
    np.testing.assert_allclose(law_of(jnp.full((200,), 0.1)), 0.1, rtol=1e-4)
    assert np.isfinite(law_of(jnp.zeros((200,)))).all()


def test_bad_values_are_refused():
    for changes, message in (
        ({"underused": -1.0}, "underused=-1"),
        ({"density_rows": 0}, "density_rows=0"),
        ({"capacity": 2}, "capacity=2"),
    ):
        with pytest.raises(ValueError, match=message):
            MutualChoice(D, N, K, **changes)
