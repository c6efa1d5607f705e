"""How well a stream mixes: documents in a batch, against rows that are drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from saex.data.exclude import Kept
from saex.data.lanes import Lanes
from saex.data.split import DOCUMENT, Part
from saex.data.store import Store

ENOUGH = 0.95  # of what a random draw has: below this a warning says what to change
WHOLE = 2**26  # rows up to which the documents of all are read; of larger stores so many at least:
SAMPLE = 2**14
_STRETCH = 2**18


def measured(
    lanes: Lanes, stores: Sequence[Store | Part], kept: Sequence[Kept], batch: int, steps: int
) -> dict[str, float]:
    """Different documents in a batch: the mean of the first `steps` batches, and the mean of
    batches of as many rows of each store that are drawn at random (estimated for large stores).

    Args:
      lanes: of the column of documents alone.
      stores, kept: that the lanes are of, and which of their rows; documents of two stores are
        different ones.
      batch: rows of a batch.
    """
    rows = np.empty((batch,), stores[0].column(DOCUMENT).numpy_dtype)
    found, share = [], np.zeros(len(stores), np.int64)
    for step in range(steps):
        lanes.gather(step * batch, (step + 1) * batch, {DOCUMENT: rows})
        source = _sources(lanes, step * batch, (step + 1) * batch)
        share += np.bincount(source, minlength=len(stores))
        found.append(sum(len(np.unique(rows[source == i])) for i in range(len(stores))))
    random = [
        expected_distinct(_documents(store, one, batch), round(n / steps))
        for store, one, n in zip(stores, kept, share.tolist())
    ]
    return {
        "documents_per_batch": float(np.mean(found)),
        "documents_per_random_batch": float(sum(random)),
    }


def _sources(lanes: Lanes, start: int, stop: int) -> np.ndarray:
    """The number of the store that each row of the sequence of batches is of."""
    source = np.empty(stop - start, np.int64)
    for span, _ in lanes.pieces_of(start, stop):
        source[span.at : span.at + span.stop - span.start] = span.source
    return source


def _documents(store: Store | Part, kept: Kept, batch: int) -> np.ndarray:
    """[rows] the document of each kept row, or of as many of them as tell the same."""
    if store.rows > WHOLE:
        return _sampled(store, kept, max(SAMPLE, 2 * batch))
    documents = store.read(DOCUMENT)
    return documents if kept.mask is None else documents[kept.mask]


def _sampled(store: Store | Part, kept: Kept, count: int) -> np.ndarray:
    """[about count] documents of kept rows drawn at random.

    A batch drawn from a random sample is one drawn from all, so what is expected of it is the same.
    """
    drawn = math.ceil(count * store.rows / max(1, int(kept.counts.sum())))
    rows = np.unique(np.random.default_rng(0).integers(0, store.rows, drawn))
    rows = rows if kept.mask is None else rows[kept.mask[rows]]
    out = np.empty(len(rows), store.column(DOCUMENT).numpy_dtype)
    store.read_ranges(DOCUMENT, [(row, row + 1) for row in rows.tolist()], out)
    return out


def expected_distinct(documents: np.ndarray, batch: int) -> float:
    """Mean number of different documents among `batch` rows drawn at random without replacement.

    Args:
      documents: [rows] the document of each row, integers.
      batch: rows that are drawn, at most as many as there are.

    A document of c of R rows is missed with probability C(R - c, b) / C(R, b).
    """
    low, high = int(documents.min()), int(documents.max())
    if high - low > 4 * len(documents):  # numbers that are names, too far apart to be counted by
        sizes = np.unique(documents, return_counts=True)[1]
    else:
        # In stretches whose memory is used again: fresh memory for all rows takes longer to touch.
        stretch, sizes = max(_STRETCH, high - low), np.zeros(high - low + 1, np.int64)
        for at in range(0, len(documents), stretch):
            sizes += np.bincount(documents[at : at + stretch] - low, minlength=len(sizes))
        sizes = sizes[sizes > 0]
    rows = int(sizes.sum())
    sizes, counts = np.unique(sizes, return_counts=True)
    return sum(n * (1 - _missed(rows, int(c), batch)) for c, n in zip(sizes, counts.tolist()))


def _missed(rows: int, size: int, batch: int) -> float:
    if size + batch > rows:
        return 0.0
    terms = (rows - size, rows - batch), (rows - size - batch, rows)
    logs = [sum(math.lgamma(x + 1) for x in side) for side in terms]
    return math.exp(logs[0] - logs[1])
