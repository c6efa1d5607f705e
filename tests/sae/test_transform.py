"""Params written otherwise do the same; smaller dictionaries do what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import BatchTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK, transform
from tests.sae import toy
from tests.sae.small import small

D, N, K = 16, 64, 4


def sample(rows=256, seed=3):
    return 3 * toy.batch(toy.directions(40, D), rows, 3, seed) + 0.5


def init(sae, seed=0):
    """Params as after a while: every latent with a bias, and a decoder norm, of its own."""
    params, _ = sae.init(jax.random.key(seed), {"x": jnp.asarray(sample())})
    draw = np.random.default_rng(seed)
    for name in ("b_enc", "b_mag", "r_mag"):
        if name in params:
            params[name] = jnp.asarray(0.1 * draw.normal(size=N), jnp.float32)
    return params


def uneven(params):
    factor = np.random.default_rng(1).uniform(0.3, 3, N).astype(np.float32)
    return {**params, "W_dec": params["W_dec"] * factor[:, None]}


def through(sae, params, x):
    """(dense codes, outputs)."""
    codes = sae.encode(params, x)
    return np.asarray(codes.dense(sae.n)), np.asarray(sae.decode(params, codes))


@pytest.mark.parametrize("name", ["relu", "jump_relu", "gated"])
def test_folding_decoder_norms_keeps_outputs(name):
    sae = small(name)
    params = uneven(init(sae))
    folded = transform.fold_decoder_norms(params)
    norms = np.linalg.norm(params["W_dec"], axis=1)
    (f, y), (g, z) = (through(sae, p, sample()) for p in (params, folded))
    assert (f > 0).any()
    np.testing.assert_allclose(np.linalg.norm(folded["W_dec"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(g, f * norms, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(z, y, atol=1e-3)


def test_folding_norms_wants_a_threshold_for_each_latent():
    sae = BatchTopK(D, N, K)
    params = uneven(init(sae))
    with pytest.raises(ValueError, match="to_jump_relu first"):
        transform.fold_decoder_norms(params)
    jump, made = transform.to_jump_relu(sae, params)
    _, y = through(sae, params, sample())
    np.testing.assert_allclose(
        through(jump, transform.fold_decoder_norms(made), sample())[1], y, atol=1e-3
    )
    with pytest.raises(ValueError, match="no W_enc"):
        transform.fold_decoder_norms(init(MatchingPursuit(D, N, K)))


@pytest.mark.parametrize("sae", [BatchTopK(D, N, K), Gated(D, N), JumpReLU(D, N)], ids=str)
def test_thresholded_dictionaries_are_jump_relus(sae):
    params = init(sae)
    jump, made = transform.to_jump_relu(sae, params)
    assert isinstance(jump, JumpReLU)
    assert {k: v.shape for k, v in made.items()} == {
        k: s.shape for k, s in jump.specs()["params"].items()
    }
    assert all(np.isfinite(v).all() for v in made.values())
    (f, y), (g, z) = through(sae, params, sample()), through(jump, made, sample())
    assert (f > 0).any()
    np.testing.assert_allclose(g, f, atol=1e-4)
    np.testing.assert_allclose(z, y, atol=1e-4)


@pytest.mark.parametrize("k", [K, 1.5, 30])
def test_a_threshold_gives_the_l0_it_is_asked_for(k):
    """On the rows themselves exactly; 30 is more than most rows have candidates for at first."""
    sae, x = TopK(D, N, K), sample(300)
    params = init(sae)
    p = x * float(params["scale"]) - np.asarray(params["b_dec"])
    p = p @ np.asarray(params["W_enc"]).T + np.asarray(params["b_enc"])
    threshold = transform.estimate_threshold(sae, params, x, k, batch=128)
    assert (p > threshold).sum() == min(round(k * 300), (p > 0).sum())
    f, _ = through(*transform.to_jump_relu(sae, params, threshold), x)
    np.testing.assert_allclose(f, np.where(p > threshold, p, 0), atol=1e-4)


def test_candidates_that_are_too_few_are_noticed():
    """One row holds nearly all large values; n is beyond the first number of candidates."""
    n = 512
    sae = TopK(D, n, 1)
    params, _ = sae.init(jax.random.key(0), {"x": jnp.asarray(sample())})
    x = np.concatenate([100 * sample(1), 1e-3 * sample(99)]) + 1e-3
    p = x * float(params["scale"]) - np.asarray(params["b_dec"])
    p = p @ np.asarray(params["W_enc"]).T
    threshold = transform.estimate_threshold(sae, params, x)
    assert (p[0] > threshold).sum() > 68 and (p > threshold).sum() == 100


def test_a_topk_without_threshold_is_refused():
    sae = TopK(D, N, K)
    with pytest.raises(ValueError, match="estimate_threshold"):
        transform.to_jump_relu(sae, init(sae))
    with pytest.raises(ValueError, match="ReLU is no JumpReLU"):
        transform.to_jump_relu(ReLU(D, N), init(ReLU(D, N)))


@pytest.mark.parametrize("name", ["relu", "jump_relu", "gated", "batch_topk"])
def test_pruning_keeps_the_codes_of_those_that_stay(name):
    sae = small(name)
    params, keep = init(sae), np.arange(N) % 3 > 0
    f, _ = through(sae, params, sample())
    smaller, made = transform.prune(sae, params, keep)
    assert smaller.n == keep.sum()
    g, y = through(smaller, made, sample())
    np.testing.assert_allclose(g, f[:, keep], atol=1e-5)
    codes = sae.encode(params, sample()).replace(values=jnp.asarray(f * keep))
    np.testing.assert_allclose(y, sae.decode(params, codes), atol=1e-4)


def test_latents_may_be_put_in_another_order():
    sae = TopK(D, N, K)
    params, order = init(sae), np.random.default_rng(0).permutation(N)
    f, y = through(sae, params, sample())
    g, z = through(*transform.prune(sae, params, order), sample())
    np.testing.assert_allclose(g, f[:, order], atol=1e-6)
    np.testing.assert_allclose(z, y, atol=1e-4)


def test_bad_latents_are_refused():
    sae = TopK(D, N, K)
    params = init(sae)
    for keep in (np.zeros(N, bool), [0, N], [1, 1, 2, 3]):
        with pytest.raises(ValueError, match="keep="):
            transform.prune(sae, params, keep)
    with pytest.raises(ValueError, match="k=4"):
        transform.prune(sae, params, [0, 1])
    with pytest.raises(ValueError, match="two groups"):
        transform.merge(sae, params, [[0, 1], [1, 2]])


@pytest.mark.parametrize("name", ["relu", "jump_relu", "gated"])
def test_merging_equal_latents_keeps_outputs(name):
    """Latents 5 and 40 are copies of 2: one latent writes what the three wrote."""
    sae = small(name)
    params = init(sae)
    for key, spec in sae.specs()["params"].items():
        if spec.axes[:1] == ("n",):
            params[key] = params[key].at[jnp.array([5, 40])].set(params[key][2])
    groups = transform.alike(params, 0.99)
    assert groups == [[2, 5, 40]]
    f, y = through(sae, params, sample())
    merged, made = transform.merge(sae, params, groups)
    g, z = through(merged, made, sample())
    assert merged.n == N - 2 and (f[:, 2] > 0).any()
    np.testing.assert_allclose(g[:, 2], 3 * f[:, 2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z, y, atol=1e-3)
    norms = np.linalg.norm(params["W_dec"], axis=1)
    np.testing.assert_allclose(np.linalg.norm(made["W_dec"], axis=1)[2], norms[2], rtol=1e-5)


def test_near_copies_are_found():
    rows = np.eye(4, 8, dtype=np.float32)
    rows[3] = [0.99, 0.14, 0, 0, 0, 0, 0, 0]
    assert transform.alike({"W_dec": jnp.asarray(5 * rows)}, 0.95) == [[0, 3]]
    assert transform.alike({"W_dec": jnp.asarray(5 * rows)}, 0.999) == []
    assert transform.alike({"W_dec": -jnp.asarray(rows)}, 0.95) == [[0, 3]]
