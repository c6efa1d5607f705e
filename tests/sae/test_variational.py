"""What the card of the variational SAE promises, checked against independent numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import TopK, Variational
from saex.sae.variational import divergence, normal
from tests.sae import toy

D, N, K = 8, 32, 4
KEY = jax.random.key(7)


def sample(rows=64, seed=3):
    return toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3


START = jax.jit(Variational(D, N, K).init)(jax.random.key(0), {"x": sample(256)})


def made(**changes):
    sae = Variational(**{"d_in": D, "n": N, "k": K, **changes})
    params, stats = (dict(tree) for tree in START)
    if sae.variance != "learned":
        params = {name: params[name] for name in sae.specs()["params"]}
    return sae, params, stats


def loss_of(sae, params, stats, x, key=KEY, step=10**6, **hyper):
    hyper = {**sae.hyper(), **hyper}
    return sae.loss(params, stats, {"x": jnp.asarray(x)}, key, jnp.int32(step), hyper)


def moments(params, x):
    """(mu, log sigma^2) in float64."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    rows = x * p["scale"] - p["b_dec"]
    return rows @ p["W_enc"].T + p["b_enc"], np.clip(rows @ p["W_var"].T + p["b_var"], -10, 2)


def top(z):
    return np.where(z >= np.sort(z, axis=1)[:, -K][:, None], np.maximum(z, 0), 0)


@pytest.mark.parametrize("kl_over", ["all", "selected"])
def test_the_loss_is_the_published_one(kl_over):
    sae, params, stats = made(kl_over=kl_over, kl_coefficient=0.01)
    x = sample()
    mu, log_variance = moments(params, x)
    e = np.asarray(normal(KEY, jnp.zeros((len(x), N))), np.float64)
    f = top(mu + np.exp(log_variance / 2) * e)
    y = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    each = (np.exp(log_variance) + mu**2 - 1 - log_variance) / 2
    if kl_over == "selected":
        each = np.where(f > 0, each, 0)
    loss, out = loss_of(sae, params, stats, x)
    squares = ((x * np.float64(params["scale"]) - y) ** 2).mean() * float(stats["mse_scale"])
    np.testing.assert_allclose(out.metrics["kl"], each.sum(1).mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, squares + 0.01 * each.sum(1).mean(), rtol=1e-4)
    np.testing.assert_allclose(out.reconstruction, y, atol=1e-4)


def test_inference_is_topk_of_mu():
    sae, params, _ = made()
    f = sae.encode(params, sample()).dense(N)
    np.testing.assert_allclose(f, top(moments(params, sample())[0]), atol=1e-5)


def test_without_noise_and_divergence_it_is_topk():
    sae, params, stats = made(variance="none", kl_coefficient=0.0)
    plain, x = TopK(D, N, K), sample()
    assert not {"W_var", "b_var"} & set(sae.specs()["params"])
    both = [
        jax.value_and_grad(lambda p: loss_of(s, p, stats, x)[0])(params)  # noqa: B023
        for s in (sae, plain)
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-6)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(both[0][1][name], both[1][1][name], atol=1e-6, err_msg=name)


def test_noise_is_of_the_key():
    sae, params, stats = made(log_variance=-2.0)
    params["b_var"] = params["b_var"] + 4
    x = sample()
    one, same, other = (float(loss_of(sae, params, stats, x, key)[0]) for key in (KEY, KEY, KEY2))
    assert one == same and abs(one - other) > 1e-4


KEY2 = jax.random.key(8)


def test_noise_is_standard_normal_in_every_row():
    e = np.asarray(normal(KEY, jnp.zeros((512, 64))))
    assert abs(e.mean()) < 0.02 and abs(e.var() - 1) < 0.03 and abs((e**4).mean() - 3) < 0.2
    for side in (e[1:] * e[:-1], e[:, 1:] * e[:, :-1]):  # neighbours know nothing of each other
        assert abs(side.mean()) < 0.02


def test_divergence_is_a_divergence():
    mu, log_variance = np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-4, 2, 13))
    mu, log_variance = jnp.asarray(mu, jnp.float32), jnp.asarray(log_variance, jnp.float32)
    kl = np.asarray(divergence(mu, log_variance))
    assert (kl >= -1e-6).all() and (kl < 1e-6).sum() == 1
    assert float(divergence(jnp.zeros(()), jnp.zeros(()))) == 0
    to_mu, to_log = jax.grad(lambda *a: divergence(*a).sum(), (0, 1))(mu, log_variance)
    np.testing.assert_allclose(to_mu, mu, atol=1e-6)
    np.testing.assert_allclose(to_log, (np.exp(log_variance) - 1) / 2, atol=1e-6)


def test_all_latents_selected_is_all_latents():
    """With k = n and every z above 0 the masked divergence is the whole one, gradients too."""
    _, params, stats = made()
    params["b_enc"], params["b_var"] = params["b_enc"] + 4, params["b_var"] - 4

    def of(over):
        sae = made(k=N, kl_over=over, kl_coefficient=0.1)[0]
        return jax.value_and_grad(lambda p: loss_of(sae, p, stats, sample()), has_aux=True)(params)

    one, all_of_them = map(of, ("selected", "all"))
    assert float(one[0][1].metrics["l0"]) == N
    np.testing.assert_allclose(one[0][0], all_of_them[0][0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one[1], all_of_them[1])


def test_its_weight_warms_up():
    sae, params, stats = made(kl_coefficient=0.1, kl_warmup_steps=10)
    at = [float(loss_of(sae, params, stats, sample(), step=s)[0]) for s in (0, 5, 10, 99)]
    np.testing.assert_allclose(np.diff(at), [(at[2] - at[0]) / 2] * 2 + [0], rtol=1e-4)
    none = float(loss_of(sae, params, stats, sample(), kl_coefficient=0.0)[0])
    np.testing.assert_allclose(at[0], none, rtol=1e-6)


def test_a_fixed_variance_is_one():
    sae, params, stats = made(variance="fixed", kl_coefficient=0.01)
    x = sample()
    mu = moments(START[0], x)[0]
    _, out = loss_of(sae, params, stats, x)
    np.testing.assert_allclose(out.metrics["kl"], (mu**2).sum(1).mean() / 2, rtol=1e-4)
    f = top(mu + np.asarray(normal(KEY, jnp.zeros((len(x), N)))))
    np.testing.assert_allclose(out.metrics["l0"], (f > 0).sum(1).mean(), rtol=1e-6)


def test_bad_values_are_refused():
    for changes, message in (
        ({"k": 0}, "k=0"),
        ({"kl_coefficient": -1.0}, "kl_coefficient=-1"),
        ({"log_variance": 9.0}, "log_variance=9"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Variational(D, N, K), **changes)
