"""What a stream refuses before it reads: stores, lanes and meshes that do not fit its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saex.data import joined
from saex.data.manifest import StoreError
from saex.data.mixed import Mixed
from saex.data.split import Part
from saex.data.store import Store
from saex.sharding import DATA


def check_store(store: Store | Part | Mixed, names: Mapping[str, str]) -> None:
    """Refuses a store that is not complete, or lacks a column."""
    if not store.complete:
        raise StoreError(
            f"{store.path} is not complete ({store.rows} rows so far): its writer was stopped. "
            "Run the same harvest again, it goes on where it stopped"
        )
    for stored in names.values():
        joined.column(store, stored)


def check_rows(store: Store | Part | Mixed, kept: int, batch: int) -> None:
    """Refuses a store of which less than a batch is kept."""
    if kept < batch:
        raise StoreError(
            f"{store.path} has {store.rows} rows, {kept} of which are kept: fewer than one batch "
            f"of {batch}. Harvest more rows, exclude fewer, or make stream.batch smaller"
        )


def check_lanes(lanes: int, processes: int) -> None:
    """Refuses lanes that the processes cannot share."""
    if lanes % processes:
        raise ValueError(
            f"stream.lanes={lanes} cannot be shared by {processes} processes: use a multiple, such "
            f"as {-(-lanes // processes) * processes} (another number of lanes is another order)"
        )


def check_mesh(batch: int, mesh: Any) -> None:
    """Refuses a batch that the data axis of the mesh does not divide."""
    if mesh is None:
        return
    if DATA not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}; the stream needs {DATA!r}")
    parts = mesh.shape[DATA]
    if batch % parts:
        raise ValueError(
            f"stream.batch={batch} cannot be split over mesh.{DATA}={parts}: "
            f"use a multiple of {parts}, such as {-(-batch // parts) * parts}"
        )
