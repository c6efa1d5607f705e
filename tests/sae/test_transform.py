"""Params written otherwise do the same; smaller dictionaries do what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import (
    BatchTopK,
    Gated,
    GroupMax,
    Guided,
    JumpReLU,
    KronSAE,
    MatchingPursuit,
    Matryoshka,
    TopK,
    transform,
)
from saex.sae.matryoshka import first_latents
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
    with pytest.raises(ValueError, match="KronSAE"):
        kron, _ = KronSAE(D, N, K).init(jax.random.key(0), {"x": jnp.asarray(sample())})
        transform.fold_decoder_norms(kron)


def test_folding_the_scale_keeps_what_training_and_choice_read():
    x, g = sample(), np.random.default_rng(4).normal(size=(256, D)).astype(np.float32)
    sae = small("gradient_topk", beta=3.0)
    params, _ = jax.jit(sae.init)(jax.random.key(0), toy.columns(sae, sample(), 0))
    folded = transform.fold_scale(params)
    one, two = (sae.encode_by_effect(p, (x, g)).dense(N) for p in (params, folded))
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert np.abs(sae.encode(params, x).dense(N) - one).max() > 0.1
    sae = small("variational")
    params = init(sae)
    folded, c = transform.fold_scale(params), float(params["scale"])
    one, two = (
        (x * unit - np.asarray(p["b_dec"])) @ np.asarray(p["W_var"]).T
        for unit, p in ((c, params), (1, folded))
    )
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    params = init(small("group_bias"))
    params["amplitude"] = params["amplitude"] * 1.5
    folded = transform.fold_scale({**params, "W_dec": 1.5 * params["W_enc"]})
    tied = folded["amplitude"][:, None] * folded["W_enc"]
    np.testing.assert_allclose(folded["W_dec"], tied, rtol=1e-5)


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


def test_places_that_mean_something_are_kept():
    sae = Guided(D, N, K, concepts=3)
    params = init(sae)
    smaller, _ = transform.prune(sae, params, [0, 1, 2, 9, 7, 8])
    assert smaller.concepts == 3
    for keep in ([1, 2, 3, 4, 5], [1, 0, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"Guided.*0\.\.2"):
            transform.prune(sae, params, keep)
    sae = GroupMax(D, N, K)  # of 16 latents each
    params = init(sae)
    f, _ = through(sae, params, sample())
    keep = np.sort(
        np.argsort((f > 0).sum(0).reshape(K, 16), axis=1)[:, 4:] + [[0], [16], [32], [48]]
    )
    smaller, made = transform.prune(sae, params, keep.reshape(-1))
    g, _ = through(smaller, made, sample())
    alone = (f > 0).sum(1) == (f[:, keep.reshape(-1)] > 0).sum(1)  # rows that lost nothing
    assert alone.any()
    np.testing.assert_allclose(g[alone], f[alone][:, keep.reshape(-1)], atol=1e-5)
    for keep in (np.arange(N) > 0, np.arange(N) >= 16, np.arange(N)[::-1]):
        with pytest.raises(ValueError, match=r"GroupMax.*4 groups of 16"):
            transform.prune(sae, params, keep)


def test_prefixes_keep_what_is_left_of_them():
    sae = Matryoshka(D, N, K, fractions=(0.25, 0.25, 0.5))
    params, keep = init(sae), np.r_[0:5, 20:32, 33:64]
    smaller, made = transform.prune(sae, params, keep)
    assert smaller.prefixes == (5, 17, 48)
    f, g = (through(s, p, sample())[0] for s, p in ((sae, params), (smaller, made)))
    np.testing.assert_allclose(g, f[:, keep], atol=1e-5)
    (_, y), (_, z) = (
        through(*first_latents(*one), sample()) for one in ((smaller, made, 5), (sae, params, 5))
    )
    np.testing.assert_allclose(y, z, atol=1e-5)
    for keep in (np.arange(16, N), np.arange(N)[::-1]):
        with pytest.raises(ValueError, match=r"Matryoshka.*\(16, 32, 64\)"):
            transform.prune(sae, params, keep)
    drawn = Matryoshka(D, N, K, sampled=3)
    assert transform.prune(drawn, params, np.arange(8, N))[0].n == 56


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
