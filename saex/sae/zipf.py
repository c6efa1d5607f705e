"""How often latents fire, and the law that their frequencies should follow (arXiv 2411.02124).

Sorted by how often they fire, latents follow a Zipf-Mandelbrot law, density = c (rank + b)^-a, with
a drop at the end: dead latents, and those that are dying. The law is fitted without that end; what
fires much less than its rank should is underused.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex.kernels import zeros_as
from saex.sae import ops, sums
from saex.sae.base import ArraySpec, LossCodes
from saex.typing import Params

SHIFTS = 16  # values of b that are tried, 0 and up to n in equal ratios
KEPT = 0.9  # of the ranks are fitted


def specs(n: int) -> dict[str, ArraySpec]:
    """Stats that ``count`` and ``refresh`` keep."""
    return {
        "density": ArraySpec((n,), ("n",), doc="running share of rows in which a latent fires"),
        "law": ArraySpec((n,), ("n",), doc="the share that the law gives to its rank"),
        "rows_seen": ArraySpec((), (), doc="rows that density has seen"),
    }


def start(n: int, k: int) -> Params:
    """Stats of the first step: no density, a law by which all fire alike, k of n in each row."""
    nothing = jnp.zeros(())
    return {"density": jnp.zeros((n,)), "law": jnp.full((n,), k / n), "rows_seen": nothing}


def count(stats: Params, codes: LossCodes, rows: int, memory: int) -> Params:
    """The stats after a batch; the mean forgets over ``memory`` rows, and is one before that."""
    fired = sums.firings(codes, stats["density"].shape[0]).astype(jnp.float32) / rows
    seen = stats["rows_seen"] + rows
    weight = rows / jnp.minimum(seen, max(memory, rows))
    moved = stats["density"] + weight * (fired - stats["density"])
    return {**stats, "density": moved, "rows_seen": seen}


def refresh(stats: Params, due: Bool[Array, ""]) -> Params:
    """The stats with the law fitted anew to the density, where that is due (on all devices)."""

    def anew(density, law):
        return law_of(density)

    def keep(density, law):
        return law + 0

    return {**stats, "law": jax.lax.cond(due, anew, keep, stats["density"], stats["law"])}


def settled(stats: Params, memory: int) -> Bool[Array, ""]:
    """Whether the density has seen enough rows to be believed."""
    return stats["rows_seen"] >= memory


def underused(
    stats: Params, dead: Bool[Array, " n"], share: float, memory: int
) -> Bool[Array, " n"]:
    """Dead latents and, once densities are settled, those below ``share`` of their law."""
    low = stats["density"] < share * stats["law"]
    return dead | (low & settled(stats, memory))


def law_of(density: Float[Array, " n"]) -> Float[Array, " n"]:
    """What the fitted law says for the rank of each of this device's latents."""
    n_local = density.shape[0]
    everyone = ops.latents_gather(density[None])[0]
    order = jnp.argsort(-everyone)  # stable: of equals the lower latent ranks higher
    by_rank = fit(everyone[order])
    by_latent = zeros_as(everyone.shape, by_rank).at[order].set(by_rank)
    return jax.lax.dynamic_slice_in_dim(by_latent, ops.latents_offset(n_local), n_local)


def fit(sorted_density: Float[Array, " n"]) -> Float[Array, " n"]:
    """The law's values at all ranks, from densities sorted downwards.

    Least squares of log density on log (rank + b) over the first 90% of the ranks, without those
    that never fired, for each b of a grid; the best b is taken. Never rises with rank.
    """
    n = sorted_density.shape[0]
    rank = jnp.arange(1, n + 1, dtype=jnp.float32)
    counts = (sorted_density > 0) & (rank <= max(KEPT * n, 2))
    y = jnp.log(jnp.where(counts, sorted_density, 1))
    w = counts / jnp.maximum(jnp.sum(counts), 1)

    def line(b):
        x = jnp.log(rank + b)
        x_mean, y_mean = w @ x, w @ y
        spread = jnp.maximum(w @ jnp.square(x - x_mean), 1e-12)
        slope = jnp.minimum((w @ ((x - x_mean) * (y - y_mean))) / spread, 0)
        law = y_mean + slope * (x - x_mean)
        return w @ jnp.square(y - law), law

    shifts = jnp.concatenate([jnp.zeros((1,)), jnp.geomspace(1, max(n, 2), SHIFTS - 1)])
    errors, laws = jax.lax.map(line, shifts)
    return jnp.exp(laws[jnp.argmin(errors)])


def budgets(law: Float[Array, " n"], total: Any, shift: Any, most: int) -> Float[Array, " n"]:
    """Whole numbers in proportion to the law that sum to ``total`` over all devices' latents.

    Each is its share of the total rounded down or up: floor(c_j + shift) - floor(c_j-1 + shift)
    with c the running sums. With a shift drawn from 0..1 their means are the shares, also where
    those are below 1: so the means fall with rank, while one draw may rise by 1. None is above
    ``most`` (rows of a batch), which may cost some of the total.
    """
    n_local = law.shape[0]
    everyone = ops.latents_gather(law[None])[0]
    sums = jnp.cumsum(everyone / jnp.sum(everyone)) * total
    sums = jnp.floor(jnp.concatenate([sums[:1] * 0, sums[:-1], sums[:1] * 0 + total]) + shift)
    whole = jnp.minimum(sums[1:] - sums[:-1], most)
    return jax.lax.dynamic_slice_in_dim(whole, ops.latents_offset(n_local), n_local)


def check(underused: float, density_rows: int, law_every: int) -> None:
    """Raise ValueError where densities cannot be counted or judged by these."""
    if underused < 0:
        raise ValueError(f"underused={underused}: cannot be negative")
    if density_rows < 1 or law_every < 1:
        raise ValueError(f"density_rows={density_rows}, law_every={law_every}: both at least 1")
