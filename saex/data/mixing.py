"""How well a stream mixes: documents in a batch, against rows that are drawn at random."""

from __future__ import annotations

import math

import numpy as np


def expected_distinct(documents: np.ndarray, batch: int) -> float:
    """Mean number of different documents among `batch` rows drawn at random without replacement.

    Args:
      documents: [rows] the document of each row.
      batch: rows that are drawn, at most as many as there are.

    A document of c of R rows is missed with probability C(R - c, b) / C(R, b).
    """
    rows = len(documents)
    sizes, counts = np.unique(np.unique(documents, return_counts=True)[1], return_counts=True)
    return sum(n * (1 - _missed(rows, int(c), batch)) for c, n in zip(sizes, counts.tolist()))


def _missed(rows: int, size: int, batch: int) -> float:
    if size + batch > rows:
        return 0.0
    terms = (rows - size, rows - batch), (rows - size - batch, rows)
    logs = [sum(math.lgamma(x + 1) for x in side) for side in terms]
    return math.exp(logs[0] - logs[1])
