"""Which layers may share a dictionary: angular distances between sites, and groups of them.

After Ghilardi et al. 2024 (Group-SAE, arXiv 2410.21508): layers whose activations point the same
way, row by row, are put into one group, and one dictionary serves a group. Where this differs: the
rows are centred by their mean over the rows that are read, not by a running mean.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from saex.evals.rows import Rows


def angular_distances(
    store: Any, sites: Sequence[str], rows: int = 65_536, **skip: Any
) -> Float[np.ndarray, "p p"]:
    """D[i, j]: mean over rows of arccos(cosine(x_i, x_j)) / pi, of centred rows; in 0..1.

    Args:
      store: with a column for each site, of equal width.
      sites: their names, in the order of the layers.
      rows: about how many rows are read, evenly spread, twice.
      skip: fields of ``saex.evals.Rows`` that leave rows out, such as ``skip_positions=(0,)``.
    """
    readers = [Rows(store, site, **skip) for site in sites]
    widths = {reader.read(0, 1).shape[1] for reader in readers}
    if len(widths) > 1:
        raise ValueError(f"sites of widths {sorted(widths)}: angles need sites of one width")
    count, total = 0, np.zeros((len(sites), 1, 1))
    for kept, x in _blocks(readers, rows):
        total = total + x[:, kept].sum(axis=1, keepdims=True, dtype=np.float64)
        count += int(kept.sum())
    if not count:
        raise ValueError("no row is left: skip fewer positions or tokens")
    out = np.zeros((len(sites), len(sites)))
    for kept, x in _blocks(readers, rows):
        unit = x[:, kept] - total / count
        unit /= np.maximum(np.linalg.norm(unit, axis=2, keepdims=True), 1e-30)
        cosines = np.einsum("ibd,jbd->ijb", unit, unit)
        out += np.arccos(np.clip(cosines, -1, 1)).sum(axis=2) / np.pi
    out /= count
    np.fill_diagonal(out, 0)  # rounding: arccos is steep at 1
    return (out + out.T) / 2


def _blocks(readers: Sequence[Rows], rows: int) -> Any:
    """(kept [b], float32 rows [p, b, d]) of the same rows of every site."""
    for blocks in zip(*(reader.blocks(rows) for reader in readers)):
        yield blocks[0].kept, np.stack([block.x.astype(np.float32) for block in blocks])


def groups(distances: Float[np.ndarray, "p p"], count: int) -> list[list[int]]:
    """``count`` groups by agglomerative clustering with complete linkage, in order of first member.

    Two groups are as far apart as their farthest members; the nearest two are joined until there
    are ``count``, the earlier ones where several are as near. With layers, groups come out
    contiguous where distance grows with depth, which is not enforced.

    Raises:
      ValueError: more groups than sites, or none.
    """
    p = len(distances)
    if not 1 <= count <= p:
        raise ValueError(f"count={count} groups of {p} sites: between 1 and {p}")
    out = [[i] for i in range(p)]
    while len(out) > count:
        apart = {
            (a, b): distances[np.ix_(out[a], out[b])].max()
            for a in range(len(out))
            for b in range(a + 1, len(out))
        }
        a, b = min(apart, key=lambda pair: (apart[pair], pair))
        out[a] = sorted(out[a] + out.pop(b))
    return sorted(out)


def amad(distances: Float[np.ndarray, "p p"], grouping: Sequence[Sequence[int]]) -> float:
    """Average over groups of the largest distance between two members: 0 for groups of one."""
    return float(np.mean([distances[np.ix_(group, group)].max() for group in grouping]))


def fewest_groups(distances: Float[np.ndarray, "p p"], below: float = 0.2) -> list[list[int]]:
    """The fewest groups whose ``amad`` is below a bound (the source's: about 0.2)."""
    for count in range(1, len(distances) + 1):
        found = groups(distances, count)
        if amad(distances, found) < below:
            return found
    raise ValueError(f"below={below}: groups of one site each have distance 0; take more than 0")
