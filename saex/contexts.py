"""The contexts of a text in the order of a harvest, and what a model's sites hold there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from saex.data.exclude import NORM
from saex.data.order import permutation
from saex.data.text import chunk

if TYPE_CHECKING:
    from saex.harvest import Harvest


@dataclass(frozen=True)
class Contexts:
    """The contexts of a harvest, in its order.

    Attributes:
      tokens: [contexts, context] int32, 0 from `lengths` on.
      lengths: [contexts] int64, tokens that count.
      documents: [contexts] int32, number of the document in the split.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def choose(
    source: Any, split: str, cfg: Harvest, seed: int, encode: Callable[[str], Any], bos: int
) -> Contexts:
    """As many whole contexts of a split as fit the budget of rows, in a random order.

    Raises:
      ValueError: no text.
    """
    pieces = list(chunk(source.documents(split), encode, cfg.context, bos))
    return _choose(pieces, cfg.budget(split), seed)


def rows_of(
    contexts: Contexts, begin: int, end: int, acts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Columns of the positions that count, context by context, [rows, *shape] each.

    Args:
      contexts: all of them.
      begin, end: which.
      acts: {column: [at least end - begin, context, *shape]}.
    """
    tokens, lengths = contexts.tokens[begin:end], contexts.lengths[begin:end]
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    counts = np.flatnonzero((position < lengths[:, None]).reshape(-1))
    columns = {
        "tokens": tokens,
        "document": np.broadcast_to(contexts.documents[begin:end, None], tokens.shape),
        "position": position,
        **{name: np.asarray(x)[: end - begin] for name, x in acts.items()},
    }
    return {n: x.reshape(-1, *x.shape[2:])[counts] for n, x in columns.items()}


def make_forward(model: Any, cfg: Harvest) -> Callable:
    """(params, tokens [batch, context]) -> {site: [batch, context, width]} in the stored dtype."""
    last = max(cfg.sites, key=list(model.sites).index)

    @jax.jit
    def forward(params, tokens):
        _, acts = model.run(params, tokens, taps=cfg.sites, stop_at=last)
        stored = {site: acts[site].astype(cfg.dtype) for site in cfg.sites}
        norms = {site + NORM: _norm(x) for site, x in stored.items()} if cfg.norms else {}
        return {**stored, **norms}

    return forward


def _norm(x: jax.Array) -> jax.Array:
    """Norms over the last axis, float32, of what is stored."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def _choose(pieces: list, budget: int, seed: int) -> Contexts:
    """As many whole contexts as fit the budget of rows, in a random order."""
    if not pieces:
        raise ValueError("the text has no tokens in this split: give a source with more documents")
    order = permutation(len(pieces), seed)
    lengths = np.array([p.length for p in pieces], np.int64)[order]
    order = order[: max(1, int(np.searchsorted(np.cumsum(lengths), budget, side="right")))]
    return Contexts(
        tokens=np.stack([pieces[i].tokens for i in order]),
        lengths=lengths[: len(order)],
        documents=np.array([pieces[i].document for i in order], np.int32),
    )
