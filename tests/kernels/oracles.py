"""The ops in numpy, which every backend is compared with, and what they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

NAN = np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)  # of either sign
KINDS = ("normal", "ties", "relu", "zeros", "-inf", "nan")


def runs_here(impls, but=()):
    """The backends that XLA compiles for any platform; Pallas' have tests of their own."""
    elsewhere = {"tpu", *but, *(name for name in impls if name.startswith("pallas"))}
    names = sorted(set(impls) - elsewhere)
    return [pytest.param(n, marks=pytest.mark.interpreted if n == "gpu" else []) for n in names]


def top_k(scores, k):
    """NaN first, then largest first, the lowest index among equals: a stable sort."""
    finite = np.where(scores == np.inf, 1e300, np.float64(scores))
    order = np.argsort(-np.where(np.isnan(scores), np.inf, finite), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=-1), order


def random_scores(kind, b, n, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(0, 3, (b, n)).astype(np.float32)
    if kind == "relu":
        return np.maximum(rng.normal(size=(b, n)) - 2, 0).astype(np.float32)
    if kind == "zeros":
        return np.where(rng.random((b, n)) < 0.5, np.float32(0), np.float32(-0.0))
    if kind == "-inf":
        return np.where(rng.random((b, n)) < 0.9, -np.inf, 1.0).astype(np.float32)
    scores = rng.normal(size=(b, n)).astype(np.float32)
    if kind == "nan":  # beside infinities, and rows of nothing else
        few = rng.choice(np.float32([*NAN, np.inf, -np.inf]), (b, n))
        scores = np.where(rng.random((b, n)) < 3 / n, few, scores)
        scores[-1] = NAN[1]
    return scores


def dense(values, indices, n):
    """[b, k] slots as [b, n], float64; those of value 0 add nothing."""
    out = np.zeros((len(values), n))
    where = np.arange(len(values))[:, None], np.asarray(indices)
    np.add.at(out, where, np.float64(values))
    return out


def affine_grads(values, dvalues, indices, g, x, W_dec):
    """(dW_dec, dW_enc, db_enc) of ``sparse_affine``, as products of dense matrices."""
    n = len(W_dec)
    values, dvalues, g, x = map(np.float64, (values, dvalues, g, x))
    through = np.take_along_axis(g @ np.float64(W_dec).T, np.asarray(indices), axis=1)
    dz = dense(np.where(values != 0, dvalues + through, 0), indices, n)
    return dense(values, indices, n).T @ g, dz.T @ x, dz.sum(0)


def drawn_slots(b, n, k, seed):
    """values [b, k], a fifth of them unused; few latents are in many rows, none twice in one."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, n + 1) ** 1.3
    indices = np.stack([rng.choice(n, k, replace=False, p=p / p.sum()) for _ in range(b)])
    values = np.where(rng.random((b, k)) < 0.2, 0, rng.normal(size=(b, k))).astype(np.float32)
    return jnp.asarray(values), jnp.asarray(np.where(values != 0, indices, 0), jnp.int32)


def whole_numbers(seed, *shapes):
    """Arrays of -3..3: exact in any order of summation, also in bfloat16, and full of ties."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.integers(-3, 4, s), jnp.float32) for s in shapes)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
