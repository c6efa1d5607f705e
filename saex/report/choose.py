"""Which latents to show: the most frequent, and from each band of density the clearest."""

from typing import NamedTuple

import numpy as np

from saex.report.scan import Scan

# Lower bounds of the bands, in share of rows; the last takes everything below.
BANDS = (
    (1e-2, "more often than 1 in 100"),
    (1e-3, "1 in 100 to 1,000"),
    (1e-4, "1 in 1,000 to 10,000"),
    (0.0, "rarer than 1 in 10,000"),
)
FREQUENT = "most frequent"
CRITERION = (
    "One in six are the most frequent latents. The others are taken in turn from four bands of "
    "density, in each by clearness: how much larger the top activations are than the latent's "
    "mean where it fires, times the share of different documents and, for text, the agreement on "
    "the last two tokens among its top contexts. A latent is shown only if it fired in enough "
    "contexts."
)


class Choice(NamedTuple):
    """latent: its number. why: the group that it was taken from."""

    latent: int
    why: str


def choose(scan: Scan, clearness: np.ndarray, wanted: int, contexts: int) -> list[Choice]:
    """At most ``wanted`` latents that have ``contexts`` contexts (less where none has so many)."""
    enough = np.sum(scan.top > 0, axis=1)
    need = min(contexts, int(enough.max(initial=0)))
    able = np.flatnonzero((enough >= need) & (scan.fired > 0))
    if len(able) == 0:
        return []
    by_density = able[np.argsort(-scan.density[able], kind="stable")]
    chosen = [Choice(int(i), FREQUENT) for i in by_density[: -(-wanted // 6)]]
    queues, taken, above = [], {c.latent for c in chosen}, np.inf
    for low, words in BANDS:
        inside = able[(scan.density[able] >= low) & (scan.density[able] < above)]
        above = low
        best = inside[np.argsort(-clearness[inside], kind="stable")]
        queues.append([Choice(int(i), words) for i in best if int(i) not in taken])
    while len(chosen) < wanted and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue][: wanted - len(chosen)]
    order = [FREQUENT, *(words for _, words in BANDS)]
    return sorted(chosen, key=lambda c: order.index(c.why))


def clearness(
    scan: Scan, documents: np.ndarray | None, tokens: np.ndarray | None, contexts: int
) -> np.ndarray:
    """float64 [n]: how clear each latent's top contexts are; see ``CRITERION``.

    documents: int [n, m], the document of each top context. tokens: int [n, m, 2], the token
    before the peak and the peak's. None where the store has no such column.
    """
    top, found = scan.top[:, :contexts], scan.top[:, :contexts] > 0
    count = np.maximum(found.sum(axis=1), 1)
    peaked = top.sum(axis=1) / count / np.maximum(scan.mean, 1e-30)
    score = np.log1p(peaked)
    if documents is not None:
        score *= _distinct(documents[:, :contexts], found) / count
    if tokens is not None:
        pairs = tokens[:, :contexts, 0].astype(np.int64) << 32 | tokens[:, :contexts, 1]
        score *= (_agreement(pairs, found) + _agreement(tokens[:, :contexts, 1], found)) / count
    return score


def _distinct(ids: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How many different ids each row has among those found."""
    ids = np.sort(np.where(found, ids, -1), axis=1)
    new = np.diff(ids, axis=1, prepend=-1) > 0
    return new.sum(axis=1)


def _agreement(ids: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How often each row's commonest id stands among those found."""
    same = (ids[:, :, None] == ids[:, None, :]) & found[:, :, None] & found[:, None, :]
    return same.sum(axis=2).max(axis=1)
