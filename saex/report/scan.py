"""One pass over a store: how often each latent fires, and in which contexts it fires most."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex.evals.heldout import MOST
from saex.evals.reconstructors import everywhere, local, on_mesh_of
from saex.evals.rows import Rows
from saex.sae import DenseCodes, SparseCodes


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """What the pass found, for n latents and the top m contexts of each.

    fired: int64 [n]. total: float64 [n], sum of |value|. rows: how many rows counted.
    top: float32 [n, m], largest |value| in each of the best contexts, falling; 0: there are less.
    where: int64 [n, m], the store's row of each.
    """

    fired: np.ndarray
    total: np.ndarray
    rows: int
    top: np.ndarray
    where: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """float64 [n]: share of rows in which each latent fires."""
        return self.fired / max(self.rows, 1)

    @property
    def mean(self) -> np.ndarray:
        """float64 [n]: mean |value| of a latent where it fires."""
        return self.total / np.maximum(self.fired, 1)


def scan(
    sae: Any, params: Any, rows: Rows, starts: np.ndarray | None, at_most: int, m: int
) -> Scan:
    """Encode about ``at_most`` of the first ``MOST`` rows, evenly spread.

    Args:
      sae: the dictionary.
      params: its arrays, on any mesh.
      rows: what to read.
      starts: the row at which each context begins (``evals.heldout.context_starts``); of a context
        only the largest value counts. None: every row is its own.
      at_most: rows to read.
      m: contexts to keep of each latent.
    """
    rows.check_widths(sae)
    fired, total, count = np.zeros(sae.n, np.int64), np.zeros(sae.n), 0
    best = _Best(sae.n, m, starts)
    with on_mesh_of(params):
        for block in rows.blocks(at_most, stop=MOST):
            places, latents, values = _active(_encode(sae, params, block.x), block.kept)
            fired += np.bincount(latents, minlength=sae.n)
            total += np.bincount(latents, weights=values, minlength=sae.n)
            count += int(block.kept.sum())
            best.add(latents, values, block.start + places)
    return Scan(fired, total, count, best.values, best.rows)


@functools.partial(jax.jit, static_argnums=0)
def _encode(sae: Any, params: Any, x: Float[Array, "b d"]) -> Any:
    return everywhere(sae.encode(params, x))


def _active(codes: Any, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row in the block, latent, |value|) of every latent that fired in a row that counts."""
    values = np.abs(local(codes.values))
    places, slots = np.nonzero((values > 0) & kept[:, None])
    found = values[places, slots]
    if isinstance(codes, SparseCodes):
        slots = local(codes.indices)[places, slots]
    return places, slots, found


class _Best:
    """The m best contexts of each latent so far."""

    def __init__(self, n: int, m: int, starts: np.ndarray | None):
        self.values = np.zeros((n, m), np.float32)
        self.rows = np.zeros((n, m), np.int64)
        self.starts = starts

    def add(self, latents: np.ndarray, values: np.ndarray, rows: np.ndarray) -> None:
        # soon almost nothing is better than a latent's m-th best: what follows is then cheap
        better = values > self.values[latents, -1]
        latents, values, rows = latents[better], values[better], rows[better]
        if len(latents) == 0:
            return
        touched = np.unique(latents)
        m = self.values.shape[1]
        latents = np.concatenate([latents, np.repeat(touched, m)])
        values = np.concatenate([values, self.values[touched].reshape(-1)])
        rows = np.concatenate([rows, self.rows[touched].reshape(-1)])
        order = self._one_per_context(latents, values, rows)
        latents, values, rows = latents[order], values[order], rows[order]
        first = np.searchsorted(latents, touched)
        rank = np.arange(len(latents)) - first[np.searchsorted(touched, latents)]
        latents, values, rows, rank = (a[rank < m] for a in (latents, values, rows, rank))
        self.values[touched] = 0
        self.values[latents, rank], self.rows[latents, rank] = values, rows

    def _one_per_context(self, latents: Any, values: Any, rows: Any) -> np.ndarray:
        """Order by latent and falling value, with the best row of each context alone."""
        contexts = rows if self.starts is None else np.searchsorted(self.starts, rows, "right")
        order = np.lexsort((-values, contexts, latents))
        same = (np.diff(latents[order]) == 0) & (np.diff(contexts[order]) == 0)
        order = order[np.concatenate([[True], ~same])]
        order = order[values[order] > 0]
        return order[np.lexsort((-values[order], latents[order]))]


def values_at(sae: Any, params: Any, rows: Rows, at: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """float32 [count]: latent ``latents[i]`` on the store's row ``at[i]`` (any order)."""
    ids, back = np.unique(at, return_inverse=True)
    x = _gather(rows, ids)[back]
    out = np.zeros(len(at), np.float32)
    with on_mesh_of(params):
        for i in range(0, len(at), rows.batch):
            part, wanted = x[i : i + rows.batch], latents[i : i + rows.batch]
            missing = rows.batch - len(part)
            part = np.concatenate([part, np.zeros((missing, x.shape[1]), x.dtype)])
            wanted = np.pad(wanted, (0, missing))
            found = local(_one_latent(sae, params, part, wanted))
            out[i : i + rows.batch] = found[: rows.batch - missing]
    return out


@functools.partial(jax.jit, static_argnums=0)
def _one_latent(sae: Any, params: Any, x: Float[Array, "b d"], latents: Any) -> Any:
    codes = everywhere(sae.encode(params, x))
    if isinstance(codes, SparseCodes):
        return jnp.sum(jnp.where(codes.indices == latents[:, None], codes.values, 0), axis=1)
    return jnp.take_along_axis(codes.values, latents[:, None], axis=1)[:, 0]


def decoder_rows(sae: Any, params: Any, latents: list[int]) -> np.ndarray:
    """float32 [len(latents), d]: what one unit of each latent adds to a reconstruction."""
    devices = jax.device_count()
    ids = np.pad(np.asarray(latents, np.int32), (0, -len(latents) % devices))
    with on_mesh_of(params):
        return local(_rows_of(sae, params, ids))[: len(latents)]


@functools.partial(jax.jit, static_argnums=0)
def _rows_of(sae: Any, params: Any, ids: Any) -> Any:
    if sae.codes is SparseCodes:
        one = SparseCodes(jnp.ones((len(ids), 1)), ids[:, None])
    else:
        one = DenseCodes(jax.nn.one_hot(ids, sae.n))
    none = jax.tree.map(jnp.zeros_like, one)
    return everywhere(sae.decode(params, one) - sae.decode(params, none))


def _gather(rows: Rows, ids: np.ndarray) -> np.ndarray:
    """The site's rows ``ids`` (rising), read run by run."""
    breaks = np.flatnonzero(np.diff(ids) > 1) + 1
    runs = [(int(r[0]), int(r[-1]) + 1) for r in np.split(ids, breaks) if len(r)]
    return np.concatenate([rows.read(a, b) for a, b in runs])
