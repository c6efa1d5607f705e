"""FMS: how much of a concept is in one single latent (Härle et al. 2025, arXiv 2506.19382)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, Shaped

CHUNK = 256  # latents whose rows are sorted at once


def fms(
    codes: Float[np.ndarray, "b n"],
    label: Shaped[np.ndarray, " b"],
    removed: Sequence[int] = (1, 5),
    depth: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """The feature monosemanticity score of one concept, by decision trees on a dictionary's codes.

    On as many rows without the concept as with it: a0 is the accuracy of the best threshold on one
    latent, a_p the same after p such latents were taken away one by one, and a^(i) that of a tree
    of depth i. local@p = 2 (a0 - a_p), global = 1 - mean over i >= 2 of (a^(i) - a0), both within
    0..1; fms@p = a0 (local@p + global) / 2. 1: one latent is the concept, and nothing else knows of
    it; about 0.25: nobody does. Splits are by Gini's impurity; accuracies are those on the rows
    that the trees were made of, as in the authors' code, so use many more rows than latents matter.

    Args:
      codes: one row a token, dense.
      label: true, 1 or more than 0.5 where the concept is there; negative where it is not known.
      removed: the p.
      depth: of the tree that is grown, at most; it stops where all leaves are pure.
      seed: of the rows that are left out for balance.

    Returns:
      "accuracy" (a0), "latent" (whose threshold that is), "global", and "local@p", "fms@p".

    Raises:
      ValueError: no row with the concept, or none without.
    """
    rows = _balanced(label, seed)
    z, y = codes[rows], label[rows] > 0.5
    accuracies, latent = _tree(z, y, depth)
    best, deeper = accuracies[0], accuracies[1:]
    gained = np.mean([a - best for a in deeper]) if deeper else 0.0
    out = {"accuracy": best, "latent": latent, "global": float(np.clip(1 - gained, 0, 1))}
    z = z.copy()
    without, root = best, latent
    for p in range(1, max(removed, default=0) + 1):
        z[:, root] = 0
        (without, *_), root = _tree(z, y, 1)
        if p in removed:
            local = float(np.clip(2 * (best - without), 0, 1))
            out |= {f"local@{p}": local, f"fms@{p}": best * (local + out["global"]) / 2}
    return out


def _balanced(label: np.ndarray, seed: int) -> Integer[np.ndarray, " m"]:
    """Row numbers of as many positives as negatives, those of the commoner kind at random."""
    kinds = np.flatnonzero(label > 0.5), np.flatnonzero((label >= 0) & (label <= 0.5))
    few = min(len(kind) for kind in kinds)
    if not few:
        raise ValueError(
            f"{len(kinds[0])} rows with the concept, {len(kinds[1])} without: both are needed"
        )
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(kind, few, replace=False) for kind in kinds])


def _tree(z: np.ndarray, y: np.ndarray, depth: int) -> tuple[list[float], int]:
    """(accuracy of the tree at depth 1, 2, ..., the root's latent), grown level by level."""
    leaves, accuracies, root = [np.arange(len(y))], [], 0
    for level in range(depth):
        split = [_split(z[rows], y[rows]) for rows in leaves]
        if level == 0 and split[0] is not None:
            root = split[0][0]
        if level and not any(split):
            break
        leaves = [part for rows, at in zip(leaves, split) for part in _parts(z, rows, at)]
        right = sum(max(y[rows].sum(), (~y[rows]).sum()) for rows in leaves)
        accuracies.append(float(right / len(y)))
    return accuracies, root


def _parts(z: np.ndarray, rows: np.ndarray, at: tuple[int, float] | None) -> list[np.ndarray]:
    if at is None:
        return [rows]
    above = z[rows, at[0]] > at[1]
    return [rows[~above], rows[above]]


def _split(z: np.ndarray, y: np.ndarray) -> tuple[int, float] | None:
    """(latent, threshold) of the least impurity; None where the rows are pure or cannot be told."""
    m, best, found = len(y), np.inf, None
    if y.all() or not y.any():
        return None
    left = np.arange(1, m)[:, None]
    for first in range(0, z.shape[1], CHUNK):
        part = z[:, first : first + CHUNK]
        order = np.argsort(part, axis=0, kind="stable")
        values = np.take_along_axis(part, order, axis=0)
        below = np.cumsum(y[order], axis=0)[:-1]  # positives at or below each place
        above = y.sum() - below
        # Gini's impurity of both sides, weighted: 2 p (1 - p) times the rows
        impurity = below * (left - below) / left + above * (m - left - above) / (m - left)
        impurity = np.where(values[1:] > values[:-1], impurity, np.inf)
        row, latent = np.unravel_index(np.argmin(impurity), impurity.shape)
        if impurity[row, latent] < best:
            best = impurity[row, latent]
            found = int(first + latent), float(values[row, latent])
    return found
