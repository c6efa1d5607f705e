"""Controls: what a dictionary must beat to have learned anything."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex.evals.reconstructors import OfDictionary, Reconstructor
from saex.evals.rows import Rows
from saex.typing import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Pca:
    """The k directions of largest variance. mean: [d]; components: [k, d] orthonormal rows."""

    mean: np.ndarray
    components: np.ndarray

    @property
    def l0(self) -> float:
        """k: each row is described by k numbers."""
        return float(len(self.components))

    def reconstruct(self, x: Any, tokens: Any) -> Any:
        """Mean plus projection, float32 [b, d]."""
        return _project(x, self.mean, self.components)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenMean:
    """Each token's mean activation: what is known from the token alone. table: [v, d].

    Tokens that were not seen, or lie beyond the table, get the overall mean, ``table[-1]``.
    """

    table: np.ndarray
    l0: float | None = None

    def reconstruct(self, x: Any, tokens: Any) -> Any:
        """The rows' means, float32 [b, d]."""
        last = len(self.table) - 1
        tokens = np.asarray(tokens)
        return jnp.asarray(self.table[np.where((tokens < 0) | (tokens > last), last, tokens)])


def fit(
    train: Rows, sae: Any, key: jax.Array, k: int | None = None, rows: int = 262_144
) -> dict[str, Reconstructor]:
    """The three controls of the final table, from one pass over training rows.

    Args:
      train: rows of the training store.
      sae: the dictionary; ``untrained`` is its own initialisation.
      key: for that initialisation.
      k: components of PCA; by default the dictionary's own k.
      rows: about how many rows are read.

    Returns:
      {"pca", "untrained", "token_mean"}; the first only where rows reconstruct themselves, the
      second where the dictionary's initialisation reads no column that evaluations do not, the last
      where the store has tokens.

    Raises:
      ValueError: no k was given and the dictionary has none; or no row is left.
    """
    k = getattr(sae, "k", None) if k is None else k
    if k is None:
        raise ValueError(f"{type(sae).__name__} has no k: give fit(..., k=its L0, rounded)")
    sums = _Sums(train)
    for block in train.blocks(rows):
        sums.add(block)
    out: dict[str, Reconstructor] = {}
    if train.target is None:
        out["pca"] = sums.pca(min(k, sae.d_in))
    if set(sae.columns) <= {"x", "y"}:
        out["untrained"] = OfDictionary(sae, jax.jit(sae.init)(key, sums.sample())[0])
    if sums.by_token is not None:
        out["token_mean"] = sums.token_mean()
    return out


class _Sums:
    """Sums of shifted rows in float64: total, outer products, and by token."""

    def __init__(self, train: Rows):
        block = next(train.blocks(1))
        d = block.y.shape[1]
        first = block.y[block.kept] if block.kept.any() else block.y
        self.shift = first.astype(np.float32).mean(axis=0)
        self.count, self.total, self.outer = 0, np.zeros(d), np.zeros((d, d))
        self.by_token = None if block.tokens is None else np.zeros((0, d))
        self.tokens = np.zeros(0, np.int64)
        self.samples: list[dict[str, np.ndarray]] = []

    def add(self, block: Any) -> None:
        x, y = (rows[block.kept].astype(np.float32) for rows in (block.x, block.y))
        every = max(1, len(y) // 64)
        self.samples.append({"x": x[::every], "y": y[::every]})
        y = y - self.shift
        self.count += len(y)
        self.total += y.sum(axis=0, dtype=np.float64)
        self.outer += y.T @ y
        if self.by_token is not None:
            self._add_tokens(block.tokens[block.kept], y)

    def _add_tokens(self, tokens: np.ndarray, y: np.ndarray) -> None:
        assert self.by_token is not None
        ids, start, counts = _runs(order := np.argsort(tokens, kind="stable"), tokens)
        grow = int(ids.max(initial=-1)) + 1 - len(self.tokens)
        if grow > 0:
            self.tokens = np.pad(self.tokens, (0, grow))
            self.by_token = np.pad(self.by_token, ((0, grow), (0, 0)))
        self.tokens[ids] += counts
        if len(ids):
            self.by_token[ids] += np.add.reduceat(y[order], start, axis=0, dtype=np.float64)

    def sample(self) -> Batch:
        """Rows spread over all that was read, float32 {"x", "y": [rows, d]}."""
        return {n: jnp.asarray(np.concatenate([s[n] for s in self.samples])) for n in ("x", "y")}

    def mean(self) -> np.ndarray:
        return self.shift + self.total / self.count

    def pca(self, k: int) -> Pca:
        if self.count == 0:
            raise ValueError("every training row is left out: skip fewer positions or tokens")
        offset = self.total / self.count
        covariance = self.outer / self.count - np.outer(offset, offset)
        _, vectors = np.linalg.eigh(covariance)
        components = np.ascontiguousarray(vectors[:, ::-1][:, :k].T)
        return Pca(self.mean().astype(np.float32), components.astype(np.float32))

    def token_mean(self) -> TokenMean:
        assert self.by_token is not None
        means = self.shift + self.by_token / np.maximum(self.tokens, 1)[:, None]
        means = np.where(self.tokens[:, None] > 0, means, self.mean()[None])
        return TokenMean(np.concatenate([means, self.mean()[None]]).astype(np.float32))


def _runs(order: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, where each one's run starts in the sorted tokens, how long it is)."""
    return np.unique(tokens[order], return_index=True, return_counts=True)


@jax.jit
def _project(
    x: Float[Array, "b d"], mean: Float[Array, " d"], components: Float[Array, "k d"]
) -> Float[Array, "b d"]:
    centred = x.astype(jnp.float32) - mean[None]
    return (centred @ components.T) @ components + mean[None]
