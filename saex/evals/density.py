"""How often each latent fires: dead ones, dense ones, and the histogram between."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from saex.evals.heldout import HeldOut
from saex.evals.reconstructors import fired, local, on_mesh_of
from saex.evals.rows import Rows


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """fired: int64 [n], rows in which each latent's value is not 0. rows: how many there were."""

    fired: np.ndarray
    rows: int

    @property
    def density(self) -> np.ndarray:
        """float64 [n]: share of rows in which each latent fires."""
        return self.fired / max(self.rows, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Latents by log10 density. edges: [bins + 1]; counts: [bins]; dead: those that never fired."""

    edges: np.ndarray
    counts: np.ndarray
    dead: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Density:
    """Metrics, of latents over the rows that count:
      dead_fraction: share that never fired. Fewer rows find more of them dead, so beside it:
      density_rows: how many rows that was.
      dense_fraction: share that fires in more than 10% of rows; above_1_percent: in more than 1%.

    Fields:
      rows: about how many rows are read, evenly spread, where there are more.
    """

    rows: int = 1_048_576

    def run(self, sae: Any, params: Any, heldout: HeldOut) -> dict[str, float]:
        """The metrics; controls have no latents to count."""
        heldout.rows.check_widths(sae)
        counts = (heldout.shared or {}).get(heldout.rows.count(self.rows))
        if counts is None:
            counts = count(sae, params, heldout.rows, self.rows)
        return {
            "dead_fraction": float(np.mean(counts.fired == 0)),
            "dense_fraction": float(np.mean(counts.density > 0.1)),
            "above_1_percent": float(np.mean(counts.density > 0.01)),
            "density_rows": float(counts.rows),
        }


def count(sae: Any, params: Any, rows: Rows, at_most: int | None = None) -> Counts:
    """How often each latent fires in the rows that count."""
    hits, total = np.zeros(sae.n, np.int64), 0
    with on_mesh_of(params):
        for block in rows.blocks(at_most):
            hits += local(_fired(sae, params, block.x, block.kept))
            total += int(block.kept.sum())
    return Counts(hits, total)


def histogram(counts: Counts, bins_per_decade: int = 4) -> Histogram:
    """Alive latents by log10 density, from below one firing in all rows up to every row."""
    bins = int(np.ceil(np.log10(max(counts.rows, 10)) * bins_per_decade))
    edges = np.arange(-bins, 1) / bins_per_decade
    alive = counts.fired > 0
    heights, _ = np.histogram(np.log10(counts.density[alive]), bins=edges)
    return Histogram(edges, heights, int(np.sum(~alive)), counts.rows)


@functools.partial(jax.jit, static_argnums=0)
def _fired(sae: Any, params: Any, x: Float[Array, "b d"], kept: Bool[Array, " b"]) -> Any:
    return fired(sae.encode(params, x), kept, sae.n)
