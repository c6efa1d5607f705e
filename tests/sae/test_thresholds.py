"""Thresholds, and which methods are JumpReLUs, against numpy; every row of SAES is decided."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.sae import SAES, JumpReLU, transform
from tests.sae import toy
from tests.sae.small import small

K = 3
TAKES_NOTHING = ("relu", "jump_relu_tanh", "crosscoder", "batch_crosscoder", "skip_transcoder")
NOT_AFFINE = ("kron", "matching_pursuit")
APART = ("gated", "group_bias")
EXACT = (
    *("relu", "gated", "jump_relu", "jump_relu_tanh", "batch_topk", "matryoshka", "mutual_choice"),
    *("feature_choice", "crosscoder", "batch_crosscoder", "group_bias"),
)
TOPK_LIKE = (
    *("topk", "multi_topk", "msae", "group_max", "gradient_topk", "adaptive_k", "guided"),
    *("variational", "top_afa"),
)
OTHER = tuple(sorted(set(SAES) - {*EXACT, *TOPK_LIKE}))


@functools.cache
def made(name):
    """(dictionary, params with biases, uneven norms and thresholds of their own, raw rows)."""
    sae = small(name)
    x = 3 * toy.batch(toy.directions(40, sae.d_in), 300, 3, 1) + 0.5
    params = dict(jax.jit(sae.init)(jax.random.key(0), toy.columns(sae, x, 0))[0])
    rng = np.random.default_rng(0)
    for key, size in (("b_enc", 0.1), ("b_dec", 0.1), ("b_in", 0.1), ("b_mag", 0.1)):
        if key in params:
            params[key] = params[key] + size * rng.normal(size=params[key].shape)
    if name == "group_bias":
        params["b_enc"] = -jnp.abs(params["b_enc"])
    if np.ndim(params.get("threshold", 0)) == 1:
        params["threshold"] = params["threshold"] * rng.uniform(0.5, 2, sae.n)
    if not sae.unit_rows:
        shape = params["W_dec"].shape
        params["W_dec"] = params["W_dec"] * rng.uniform(0.5, 2, (sae.n, 1)) + 0.1 * rng.normal(
            size=shape
        )
    return sae, {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, x


def pre(name, params, x):
    """(p, what latents are compared by), float64."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    if name == "multi_layer":
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True, ddof=1) + 1e-5)
    taken = 0 if name in TAKES_NOTHING else p["b_in" if name == "transcoder" else "b_dec"]
    scores = (x * p["scale"] - taken) @ p["W_enc"].T + p["b_enc"]
    if name == "batch_crosscoder":
        one, two = np.split(p["W_dec"], [10], axis=1)
        return scores, scores * (np.linalg.norm(one, axis=1) + np.linalg.norm(two, axis=1))
    return scores, np.abs(scores) if name == "abs_topk" else scores


@pytest.mark.parametrize("name", sorted({*SAES} - {*NOT_AFFINE, *APART}))
def test_as_many_lie_above_as_are_asked_for(name):
    sae, params, x = made(name)
    found = np.asarray(transform.estimate_threshold(sae, params, x, K, batch=128))
    p, compared = pre(name, params, x)
    above = (np.abs(p) if name == "abs_topk" else p) > found
    assert abs(above.sum() - K * len(x)) <= 1  # one may lie within rounding of the threshold
    assert compared[above].min() > compared[~above].max()
    assert found.shape == ((sae.n,) if name == "batch_crosscoder" else ())


@pytest.mark.parametrize("name", [*NOT_AFFINE, *APART])
def test_other_encoders_have_no_threshold_of_this_kind(name):
    sae, params, x = made(name)
    with pytest.raises(ValueError, match="to_jump_relu" if name in APART else "no affine encoder"):
        transform.estimate_threshold(sae, params, x, K)


def test_without_a_mean_number_of_latents_k_is_wanted():
    for name in ("relu", "adaptive_k", "top_afa"):
        sae, params, x = made(name)
        with pytest.raises(ValueError, match="give k"):
            transform.estimate_threshold(sae, params, x)


@pytest.mark.parametrize("name", EXACT)
def test_the_same_function_as_a_jump_relu(name):
    sae, params, x = made(name)
    jump, other = transform.to_jump_relu(sae, params)
    assert isinstance(jump, JumpReLU)
    assert {k: v.shape for k, v in other.items()} == {
        k: s.shape for k, s in jump.specs()["params"].items()
    }
    f, g = (np.asarray(one.encode(p, x).values) for one, p in ((sae, params), (jump, other)))
    assert (f > 0).any() and (f == 0).any()
    np.testing.assert_allclose(g, f, atol=2e-5)
    y, z = sae.decode(params, sae.encode(params, x)), jump.decode(other, jump.encode(other, x))
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)


def test_group_bias_with_the_size_of_the_bias_is_one_too():
    sae, params, x = made("group_bias")
    sae = dataclasses.replace(sae, relu=True)
    jump, other = transform.to_jump_relu(sae, params)
    np.testing.assert_allclose(
        jump.encode(other, x).values, sae.encode(params, x).values, atol=1e-5
    )


@pytest.mark.parametrize("name", TOPK_LIKE)
def test_what_has_no_threshold_takes_one(name):
    sae, params, x = made(name)
    with pytest.raises(ValueError, match="estimate_threshold"):
        transform.to_jump_relu(sae, params)
    theta = float(transform.estimate_threshold(sae, params, x, K))
    jump, other = transform.to_jump_relu(sae, params, theta)
    p, _ = pre(name, params, x)
    f, clear = np.asarray(jump.encode(other, x).values), np.abs(p - theta) > 1e-5
    np.testing.assert_allclose(f[clear], np.where(p > theta, p, 0)[clear], atol=1e-4)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_jump_relu_says_why(name):
    sae, params, _ = made(name)
    with pytest.raises(ValueError, match=f"{type(sae).__name__} is no JumpReLU: it"):
        transform.to_jump_relu(sae, params, 0.1)
