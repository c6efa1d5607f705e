"""Rows whose features are known, and how many of these a dictionary found.

A generator ``make(rng, rows)`` gives magnitudes a [rows, features], 0 where a feature is absent;
rows are x = a D with unit rows D.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from study import Batches

Make = Callable[[np.random.Generator, int], np.ndarray]


def directions(features: int, d: int, seed: int = 0) -> np.ndarray:
    """Random unit rows [features, d]."""
    rows = np.random.default_rng([seed, 11]).normal(size=(features, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def orthonormal(d: int, seed: int = 0) -> np.ndarray:
    """Random orthonormal rows [d, d]: features that do not disturb each other."""
    return np.linalg.qr(directions(d, d, seed))[0].T


def sums(
    D: np.ndarray, rows: int, active: int | np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(x, codes) with x = codes D: ``active`` features (a number, or one a row), sizes 0.5..1.5."""
    rng = np.random.default_rng([seed, 13])
    rank = rng.random((rows, len(D))).argsort(axis=1)
    on = rank < np.reshape(active, (-1, 1))
    codes = np.where(on, rng.uniform(0.5, 1.5, rank.shape), 0).astype(np.float32)
    return codes @ D, codes


def drawn(make: Make, D: np.ndarray, rows: int, *seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(x [rows, d], a [rows, features]), float32."""
    a = make(np.random.default_rng([*seed, 12]), rows).astype(np.float32)
    return a @ D, a


def fresh(make: Make, D: np.ndarray, batch: int, seed: int) -> Batches:
    """New rows in each step."""
    return lambda step: {"x": drawn(make, D, batch, seed, step)[0]}


# --------------------------------------------------------------------------------------- generators


def exactly(features: int, active: int, signed: bool = False) -> Make:
    """``active`` of the features in each row, sizes 0.5..1.5; ``signed``: either sign."""

    def make(rng, rows):
        on = rng.random((rows, features)).argsort(axis=1) < active
        a = on * rng.uniform(0.5, 1.5, on.shape)
        return a * rng.choice([-1.0, 1.0], a.shape) if signed else a

    return make


def one_of_each(blocks: int, size: int) -> Make:
    """One feature of each block of ``size``, sizes 0.5..1.5."""

    def make(rng, rows):
        on = rng.integers(0, size, (rows, blocks, 1)) == np.arange(size)
        return (on * rng.uniform(0.5, 1.5, on.shape)).reshape(rows, -1)

    return make


def mixed(features: int, few: int, many: int) -> Make:
    """Half of the rows with ``few`` features, half with ``many``, of rows' norm about 1."""

    def make(rng, rows):
        active = np.where(rng.random(rows) < 0.5, few, many)[:, None]
        return (rng.random((rows, features)).argsort(axis=1) < active) / np.sqrt(active)

    return make


def zipf(features: int, l0: float, children: int = 0) -> Make:
    """Probabilities as rank^-1/2 with ``l0`` active in the mean, magnitudes N(1.5, 0.25^2).

    ``children``: features stand in blocks of a parent and its children, of which an active parent
    has one in two rows of three, and which are active nowhere else.
    """
    block = children + 1
    p = np.zeros(features)
    p[::block] = np.arange(1, -(-features // block) + 1) ** -0.5
    p *= l0 / (p.sum() * (1 + (2 / 3 if children else 0)))

    def make(rng, rows):
        on = rng.random((rows, features)) < p
        if children:
            has = on[:, ::block] & (rng.random((rows, features // block)) < 2 / 3)
            row, parent = np.nonzero(has)
            on[row, parent * block + 1 + rng.integers(0, children, len(row))] = True
        return on * rng.normal(1.5, 0.25, on.shape)

    return make


PARENTS, CHILDREN, LONE = (0, 4, 8), 3, tuple(range(12, 20))


def tree(lone: float = 0.05, parent: float = 0.2, child: float = 0.6) -> Make:
    """The 20 nodes of arXiv 2506.03093: 3 parents (0, 4, 8) with 3 children after each, 8 others.

    Args:
      lone, parent: probabilities. child: that an active parent has a child; never more than one.
    """
    p = np.zeros(20)
    p[list(PARENTS)], p[list(LONE)] = parent, lone

    def make(rng, rows):
        on = rng.random((rows, 20)) < p
        for at in PARENTS:
            has = on[:, at] & (rng.random(rows) < child)
            on[has, at + 1 + rng.integers(0, CHILDREN, has.sum())] = True
        return on * rng.normal(1.5, 0.25, on.shape)

    return make


# ------------------------------------------------------------------------------------------- scores


def cosines(params: Any, D: np.ndarray) -> np.ndarray:
    """[n, features] of decoder rows and features."""
    W = np.asarray(params["W_dec"], np.float64)
    return (W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-12)) @ D.T


def found(C: np.ndarray, least: float = 0.95) -> float:
    """Share of features that some latent has a cosine of at least this with."""
    return float((C.max(0) >= least).mean())


def precise(C: np.ndarray, alive: np.ndarray, least: float = 0.95) -> float:
    """Share of the latents that fire whose direction is a feature's."""
    return float((C.max(1) >= least)[alive].mean()) if alive.any() else 0.0
