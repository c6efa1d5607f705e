"""Scales of a harvest's int8 columns: found on its first rows, kept as long as its store."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from saex import distributed
from saex.data.manifest import Column
from saex.data.quantise import calibrate
from saex.data.store_merge import columns_there
from saex.data.store_remote import place


def with_scales(
    columns: Mapping[str, Column],
    sites: Sequence[str],
    path: str | os.PathLike,
    sample: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, Column]:
    """The columns with the scales of each site, the same on every process.

    A store, or a part of one, that is at `path` decides; so a harvest that goes on does not depend
    on whether the model gives the same bits again.

    Args:
      columns: of the harvest.
      sites: those that shall be int8.
      path: of the store.
      sample: makes {site: [rows, width]}, called by the first process where there is no store yet.
    """
    found = dict(columns)
    if distributed.is_main():
        there = columns_there(place(path)) or {}
        known = {site: there[site] for site in sites if site in there}
        if len(known) < len(sites):
            known = {site: calibrate(rows) for site, rows in sample().items()}
        found |= known
    return {n: _shared(c) if n in sites else c for n, c in found.items()}


def _shared(column: Column) -> Column:
    """The first process's scales and outliers."""
    if jax.process_count() == 1:
        return column
    from jax.experimental import multihost_utils

    width = column.shape[-1]
    mine = np.zeros((2, width), np.float32)
    if column.scales is not None:
        mine[0], mine[1, list(column.outliers)] = column.scales, 1
    scales, outliers = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    numbers = tuple(np.flatnonzero(outliers).tolist())
    return dataclasses.replace(
        column, dtype="int8", scales=tuple(scales.tolist()), outliers=numbers
    )
