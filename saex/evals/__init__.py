"""Evaluations: an evaluation is one file here and one line in ``EVALS``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from saex.evals import controls
from saex.evals.cross_entropy import CrossEntropy
from saex.evals.density import Counts, Density, Histogram, count, histogram
from saex.evals.heldout import Contexts, HeldOut
from saex.evals.reconstruction import Reconstruction
from saex.evals.reconstructors import Constant, OfDictionary, Reconstructor
from saex.evals.rows import Rows
from saex.evals.table import table

EVALS: dict[str, type] = {
    "reconstruction": Reconstruction,
    "density": Density,
    "cross_entropy": CrossEntropy,
}


def evaluate(
    sae: Any, params: Any, heldout: HeldOut, evals: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Every evaluation's metrics in one flat mapping, as ``eval.json`` holds it.

    Args:
      sae: the dictionary.
      params: its arrays, as ``load_sae`` or a train state has them, on any mesh.
      heldout: what it is judged on; a control's metrics stand under ``<control>.``.
      evals: name -> instance; by default one of each in ``EVALS``.

    Raises:
      StoreError: the site's rows have another width than the dictionary.
      ValueError: no row is left, or activations that are not finite.
    """
    chosen = {name: cls() for name, cls in EVALS.items()} if evals is None else evals
    heldout = dataclasses.replace(heldout, shared={})
    out: dict[str, float] = {}
    for evaluation in chosen.values():
        out |= evaluation.run(sae, params, heldout)
    return out


__all__ = [
    "EVALS",
    "Constant",
    "Contexts",
    "Counts",
    "CrossEntropy",
    "Density",
    "HeldOut",
    "Histogram",
    "OfDictionary",
    "Reconstruction",
    "Reconstructor",
    "Rows",
    "controls",
    "count",
    "evaluate",
    "histogram",
    "table",
]
