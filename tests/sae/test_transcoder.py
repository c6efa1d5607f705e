"""What the transcoder card promises, checked against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SkipTranscoder, Transcoder
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from tests.sae import toy

D, OUT, N = 8, 12, 32
MAP = np.random.default_rng(2).normal(size=(D, OUT)).astype(np.float32)


def sample(rows=512, seed=3, y=lambda x: np.maximum(x @ MAP, 0) + 1):
    x = 2 * toy.batch(toy.directions(24, D), rows, 3, seed) + 0.3
    return {"x": x, "y": y(x).astype(np.float32)}


def arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


def loss_of(sae, params, stats, batch, step=10**6, **hyper):
    hyper = {**sae.hyper(), **hyper}
    return sae.loss(params, stats, arrays(batch), None, jnp.int32(step), hyper)


def in_numpy(params):
    return {key: np.asarray(value, np.float64) for key, value in params.items()}


def test_a_transcoder_is_the_cards_equations():
    sae, batch = Transcoder(D, OUT, N, l1=0.3), sample(64)
    params, stats = sae.init(jax.random.key(0), arrays(sample()))
    p = in_numpy(params)
    x, y = batch["x"] * p["scale"], batch["y"] * p["y_scale"]
    f = np.maximum((x - p["b_in"]) @ p["W_enc"].T + p["b_enc"], 0)
    y_hat = f @ p["W_dec"] + p["b_dec"]
    loss, out = loss_of(sae, params, stats, batch)
    expected = ((y - y_hat) ** 2).sum(1).mean() + 0.3 * f.sum(1).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss_of(sae, params, stats, batch, 0)[0], expected - 0.3 * f.sum(1).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(out.reconstruction, y_hat, atol=1e-5)
    decoded = sae.decode(params, sae.encode(params, batch["x"]))
    np.testing.assert_allclose(decoded, y_hat / p["y_scale"], atol=1e-4)
    fvu = ((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    np.testing.assert_allclose(out.metrics["fvu"], fvu, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(p["W_dec"], axis=1), 1, rtol=1e-6)
    for name, unit in (("x", "scale"), ("y", "y_scale")):
        rows = sample()[name] * p[unit]
        np.testing.assert_allclose((rows**2).sum(1).mean(), 1, rtol=1e-5)


def test_a_skip_transcoder_starts_as_the_constant():
    """FVU 1 exactly on the sample, and latents at 0 where x is its mean."""
    sae, batch = SkipTranscoder(D, OUT, N, k=4), sample()
    params, stats = sae.init(jax.random.key(0), arrays(batch))
    loss, out = loss_of(sae, params, stats, batch)
    np.testing.assert_allclose([loss, out.metrics["fvu"]], 1, rtol=1e-5)
    p = in_numpy(params)
    at_mean = p["W_enc"] @ (batch["x"].mean(0) * p["scale"]) + p["b_enc"]
    np.testing.assert_allclose(at_mean, 0, atol=1e-5)
    np.testing.assert_allclose(out.reconstruction, np.tile(p["b_dec"], (512, 1)), atol=1e-6)


@pytest.mark.parametrize("skip", [True, False])
def test_a_skip_transcoder_is_the_cards_equations(skip):
    sae, batch = SkipTranscoder(D, OUT, N, k=4, skip=skip), sample(64)
    params, stats = sae.init(jax.random.key(0), arrays(sample()))
    draw = np.random.default_rng(0)
    for name in ("W_dec", "W_skip"):
        if name in params:
            params[name] = jnp.asarray(draw.normal(size=params[name].shape), jnp.float32)
    p = in_numpy(params)
    x, y = batch["x"] * p["scale"], batch["y"] * p["y_scale"]
    z = np.maximum(x @ p["W_enc"].T + p["b_enc"], 0)
    f = np.where(z >= np.sort(z, axis=1)[:, -4:-3], z, 0)
    latents = f @ p["W_dec"] + p["b_dec"]
    y_hat = latents + (x @ p["W_skip"].T if skip else 0)
    loss, out = loss_of(sae, params, stats, batch)
    np.testing.assert_allclose(out.reconstruction, y_hat, atol=1e-4)
    s = 1 / np.square(sample()["y"] * p["y_scale"] - p["b_dec"]).mean()
    np.testing.assert_allclose(loss, s * np.square(y - y_hat).mean(), rtol=1e-4)
    codes = sae.encode(params, batch["x"])
    np.testing.assert_allclose(sae.decode(params, codes) * p["y_scale"], latents, atol=1e-4)
    whole = sae.decode(params, codes, batch["x"]) * p["y_scale"]
    np.testing.assert_allclose(whole, y_hat, atol=1e-4)


def test_a_linear_map_goes_through_the_skip_path():
    """One latent, and nearly nothing is left: without the path much is."""
    linear = lambda i: sample(256, i, lambda x: x @ MAP - 2)  # noqa: E731
    left = {}
    for skip in (True, False):
        sae = SkipTranscoder(D, OUT, N, k=1, skip=skip)
        _, history = toy.fit(sae, linear, Optim(lr=0.03), make_mesh(MeshConfig()), 300)
        left[skip] = history[-1]["fvu"]
    assert left[True] < 0.01 and left[False] > 0.2, left


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="d_out=0"):
        Transcoder(D, 0, N)
    with pytest.raises(ValueError, match="k=40"):
        SkipTranscoder(D, OUT, N, k=40)
