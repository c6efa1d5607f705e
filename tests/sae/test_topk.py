"""What the TopK card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.sparse_affine.dead import BLOCKS
from saex.sae import SparseCodes, TopK, affine, losses
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy
from tests.sae.toy import loss_of

D, N, K = 8, 32, 4


def sample(rows=512, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


def init(sae, seed=0):
    return sae.init(jax.random.key(seed), {"x": jnp.asarray(sample())})


def numpy_topk(params, x, k):
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    x = x * p["scale"]
    scores = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    cut = -np.sort(-scores, axis=1)[:, k - 1 : k]
    f = np.where(scores >= cut, np.maximum(scores, 0), 0)
    return f, (f @ p["W_dec"] + p["b_dec"]) / p["scale"]


def test_encode_and_decode_are_the_published_equations():
    sae, x = TopK(D, N, K), sample(64)
    params, _ = init(sae)
    f, y = numpy_topk(params, x, K)
    codes = sae.encode(params, x)
    np.testing.assert_allclose(codes.dense(N), f, atol=1e-5)
    np.testing.assert_allclose(sae.decode(params, codes), y, atol=1e-5)
    assert codes.values.shape == (64, K) and codes.indices.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(codes.indices)[np.asarray(codes.values) == 0], 0)


def test_initialisation():
    x = sample(4096)
    params, stats = TopK(D, N, K).init(jax.random.key(0), {"x": jnp.asarray(x)})
    np.testing.assert_allclose(np.mean(np.sum((x * params["scale"]) ** 2, 1)), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1, rtol=1e-5)
    cosine = np.sum(params["W_enc"] * params["W_dec"], 1) / np.linalg.norm(params["W_enc"], axis=1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)  # tied
    towards = x * params["scale"] - params["b_dec"][None]  # geometric median: unit vectors cancel
    pull = np.mean(towards / np.linalg.norm(towards, axis=1, keepdims=True), 0)
    np.testing.assert_allclose(pull, 0, atol=1e-3)
    scaled = x * np.asarray(params["scale"])
    np.testing.assert_allclose(
        1 / stats["mse_scale"], np.mean((scaled - scaled.mean(0)) ** 2), rtol=1e-4
    )


def test_k_equal_n_is_a_relu_autoencoder():
    sae, x = TopK(D, N, N), sample(16)
    params, _ = init(sae)
    p = (x * params["scale"] - params["b_dec"][None]) @ params["W_enc"].T
    np.testing.assert_allclose(sae.encode(params, x).dense(N), np.maximum(p, 0), atol=1e-5)


def test_the_mean_predictor_scores_one():
    sae, x = TopK(D, N, K, b_dec_init="mean"), sample()
    params, stats = init(sae)
    params = {**params, "W_enc": params["W_enc"] * 0}
    loss, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose([float(loss), float(out.metrics["fvu"])], 1, rtol=1e-4)


def test_only_chosen_latents_get_a_gradient():
    sae, x = TopK(D, N, K), sample(4)
    params, stats = init(sae)
    grads = toy.grads_of(loss_of, sae, params, stats, x)
    chosen = np.asarray(sae.encode(params, x).dense(N)).any(0)
    assert 0 < chosen.sum() < N
    assert not np.asarray(grads["W_enc"])[~chosen].any()
    assert np.asarray(grads["W_enc"])[chosen].any(1).all()


def test_traced_k_below_the_bound_selects_k():
    params, stats = init(TopK(D, N, K))
    _, few = loss_of(TopK(D, N, K), params, stats, sample(), k=jnp.float32(2))
    _, own = loss_of(TopK(D, N, 2), params, stats, sample())
    np.testing.assert_array_equal(few.reconstruction, own.reconstruction)


def test_dead_latents_are_counted_in_rows():
    sae, x = TopK(D, N, K, dead_after_tokens=15), sample(8)
    params, stats = init(sae)
    fired = np.asarray(sae.encode(params, x).dense(N)).any(0)
    for count, dead in ((8, 0), (16, np.mean(~fired))):
        _, out = loss_of(sae, params, stats, x)
        stats = out.stats
        np.testing.assert_array_equal(stats["since_fired"], np.where(fired, 0, count))
        np.testing.assert_allclose(out.metrics["dead"], dead)


# ------------------------------------------------------------------------------------------- AuxK


def dense_aux_k(params, x, residual, dead, k_aux):
    """The card's equations on the whole dictionary."""
    p = (x - params["b_dec"][None]) @ params["W_enc"].T + params["b_enc"][None]
    p = jnp.where(dead[None], p, -jnp.inf)
    values, indices = jax.lax.top_k(p, min(k_aux, p.shape[1]))
    f = jnp.where(jnp.isfinite(values), jax.nn.relu(values), 0)
    e = jax.lax.stop_gradient(residual)
    e_hat = jnp.einsum("bk,bkd->bd", f, params["W_dec"][indices])
    return jnp.mean((e_hat - e) ** 2) / jnp.mean((e - e.mean(0, keepdims=True)) ** 2)


def aux_k(params, x, residual, dead):
    """(AuxK with k_aux 4, latents it served), where no latent is chosen for the main part."""
    none = SparseCodes(jnp.zeros((x.shape[0], 1)), jnp.zeros((x.shape[0], 1), jnp.int32))
    _, y, y_dead, served = affine.decode_chosen_aux(params, x, none, dead, 4)
    assert y.shape == x.shape
    return losses.aux_k(residual, y_dead, dead), served


@pytest.mark.parametrize("n_dead", [1, 4, 5, 8, 9, 20, 32])
def test_aux_k_equals_the_dense_form_in_value_and_gradient(n_dead, monkeypatch):
    monkeypatch.setitem(BLOCKS, "cpu", 8)
    sae, x = TopK(D, N, K), jnp.asarray(sample(16))
    params, _ = init(sae)
    dead = np.zeros(N, bool)
    dead[np.random.default_rng(n_dead).permutation(N)[:n_dead]] = True
    residual = x * 0.3 - 0.1

    def ours(weights):
        return aux_k({**params, **weights}, x, residual, jnp.asarray(dead))[0]

    def theirs(weights):
        return dense_aux_k({**params, **weights}, x, residual, jnp.asarray(dead), 4)

    weights = {key: params[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    (value, grads), (expected, wanted) = (
        jax.jit(jax.value_and_grad(f))(weights) for f in (ours, theirs)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in weights:
        np.testing.assert_allclose(grads[name], wanted[name], atol=1e-5, err_msg=name)
    assert not np.asarray(grads["W_enc"])[~dead].any()
    assert np.asarray(grads["W_enc"])[dead].any()  # it reaches the dead latents' encoder rows


def test_without_dead_latents_aux_k_is_nothing():
    sae, x = TopK(D, N, K), jnp.asarray(sample(16))
    params, _ = init(sae)
    value, served = aux_k(params, x, x, jnp.zeros(N, bool))
    assert float(value) == 0 and float(served) == 0


def test_aux_k_revives_latents_that_start_nearly_silent():
    """Half of the encoder rows start at 1%: with AuxK clearly more of them live at the end."""
    truth = toy.directions(64, 16)
    shrunk = np.arange(64) < 32

    def quiet(params):
        return {**params, "W_enc": jnp.where(shrunk[:, None], 0.01, 1.0) * params["W_enc"]}

    def alive(coefficient):
        sae = TopK(16, 64, 3, aux_coefficient=coefficient, k_aux=8, dead_after_tokens=2560)
        params, history = toy.fit(
            sae,
            lambda i: toy.batch(truth, 256, 3, i),
            Optim(lr=3e-3),
            make_mesh(MeshConfig()),
            600,
            change=quiet,
        )
        f = sae.encode(params, toy.batch(truth, 8192, 3, 10**7)).dense(64)
        return np.mean(np.asarray(f).any(0)[shrunk]), max(m["aux_served"] for m in history)

    with_aux, served = alive(1 / 32)
    without, _ = alive(0.0)
    assert served > 0
    assert with_aux >= 0.9, f"{with_aux:.2f} of the silenced latents live with AuxK"
    assert with_aux >= without + 0.2, f"{with_aux:.2f} with AuxK, {without:.2f} without"


def test_more_active_latents_than_a_shard_has():
    sae, x = TopK(D, N, 20), sample(16)
    params, _ = init(sae)
    expected = np.asarray(sae.encode(params, x).dense(N))
    assert (expected > 0).sum(1).max() > N // 8
    with jax.set_mesh(make_mesh(MeshConfig(1, 8))):
        codes = jax.device_get(sae.encode(params, x))
    np.testing.assert_allclose(codes.dense(N), expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 2**30 + 1])
def test_a_counter_that_could_never_say_dead_is_refused(tokens):
    with pytest.raises(ValueError, match=f"dead_after_tokens={tokens}: must be in 1"):
        TopK(D, N, K, dead_after_tokens=tokens)
