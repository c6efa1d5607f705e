"""A linear probe of a column: ridge regression on a sample, and the loss that tunes it further."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.sae import ops

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = 5


def ridge(
    x: Float[Array, "m d"], y: Float[Array, " m"], penalty: Any, counts: Any = None
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """(w, b) of least sum (x w + b - y)^2 + penalty ||w||^2; the intercept is not penalised.

    Args:
      counts: None, or 0 or 1 a row: which rows count.
    """
    counts = jnp.ones_like(y) if counts is None else counts
    x_mean, y_mean = counts @ x / jnp.sum(counts), counts @ y / jnp.sum(counts)
    x, y = (x - x_mean[None]) * counts[:, None], (y - y_mean) * counts
    gram = x.T @ x + penalty * jnp.eye(x.shape[1])
    w = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), x.T @ y)
    return w, y_mean - x_mean @ w


def fit(
    x: Float[Array, "m d"], y: Float[Array, " m"]
) -> tuple[Float[Array, " d"], Float[Array, ""], Float[Array, ""]]:
    """(w, b, penalty): the penalty of ``PENALTIES`` with least error in five-fold validation."""
    fold_of = jnp.arange(x.shape[0]) % FOLDS

    def error(case):
        penalty, fold = case
        w, b = ridge(x, y, penalty, (fold_of != fold).astype(x.dtype))
        return jnp.sum(jnp.where(fold_of == fold, jnp.square(x @ w + b - y), 0))

    penalties = jnp.asarray(PENALTIES)
    cases = jnp.repeat(penalties, FOLDS), jnp.tile(jnp.arange(FOLDS), len(PENALTIES))
    errors = jnp.sum(jax.lax.map(error, cases).reshape(-1, FOLDS), axis=1)
    best = penalties[jnp.argmin(errors)]
    return *ridge(x, y, best), best


def tuning_loss(
    w: Float[Array, " d"], b: Any, stats: Any, x: Float[Array, "b d"], y: Float[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, mean squared error) of a probe that is tuned near its ridge solution (2508.17320).

    loss = MSE + penalty ||w||^2 + pull (||w - w0|| + |b - b0|): norms, not their squares.

    Args:
      stats: probe_w, probe_b (the solution w0, b0), penalty (per row), pull.
      x, y: this device's rows and targets.
    """
    error = ops.rows_mean(jnp.square(x @ w + b - y))
    away = _norm(w - stats["probe_w"]) + _norm((b - stats["probe_b"])[None])
    return error + stats["penalty"] * jnp.sum(jnp.square(w)) + stats["pull"] * away, error


def next_pull(pull: Any, error: Any, before: Any) -> Any:
    """A weaker pull where the error has fallen by more than 5% since ``before``, else a stronger.

    By factors 0.8 and 1.2, within 0.01 and 0.5.
    """
    falls = (before - error) / jnp.maximum(before, 1e-30) > 0.05
    return jnp.where(falls, jnp.maximum(0.8 * pull, 0.01), jnp.minimum(1.2 * pull, 0.5))


def _norm(v: Float[Array, " d"]) -> Float[Array, ""]:
    """||v||, with gradient 0 at 0."""
    square = jnp.sum(jnp.square(v))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
