"""Training straight from a subject model: rows that are made while the run goes on.

A live source is a store whose rows are computed when they are read. So the stream over it is the
stream over any store: batch i is a pure function of the seed and i, windows are disjoint and each
is emptied in a permutation of its own, the next one is made by a thread while this one is used,
and a process makes the lanes of its own rows alone. A run that goes on makes the windows of its
step again, and nothing before them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from saex.contexts import choose, is_compiled, make_forward
from saex.data.manifest import Manifest
from saex.data.resident import Device
from saex.data.room import bytes_needed, check_room
from saex.data.store_writer import StoreWriter
from saex.harvest import Harvest, buffer_bytes, columns_of, describe, settle
from saex.live_rows import LiveRows
from saex.registry import ConfigError, run_field
from saex.tee import Tee

log = logging.getLogger("saex")


@dataclass(frozen=True)
class Live:
    """Whether rows are made while the run goes on, instead of being read from a store.

    The sections `harvest` (sites, rows of an epoch, context, batch, dtype) and `stream` hold as for
    a store; a chunk is what one forward pass of `harvest.batch` contexts gives (int8 is for stores
    only: these rows are float32 then). Held-out rows are harvested into a store in any case.

    Attributes:
      enabled: make them while the run goes on.
      tee: write what is made to `WORKDIR/store/train`, each row once, for later runs.
      devices: the subject model runs on so many devices, the last ones of each process; 0: on
        those of the mesh. Each holds the whole model and makes chunks of its own.
    """

    enabled: bool = False
    tee: bool = run_field(False)
    devices: int = run_field(0)

    def __post_init__(self) -> None:
        if self.devices < 0:
            raise ValueError(f"live.devices={self.devices}: 0 (the mesh's), or how many")


def open_rows(
    model: Any,
    params: Any,
    source: Any,
    path: str | os.PathLike,
    harvest: Harvest,
    live: Live,
    *,
    sites: Sequence[str] = (),
    seed: int = 0,
    mesh: Any = None,
) -> LiveRows:
    """The training rows of a text, to be made when they are read.

    Args:
      model, params, source, sites, seed: as `saex.harvest.harvest` has them.
      path: where the tee's store goes.
      harvest, live: the sections.
      mesh: of the dictionary; its devices are the model's too, unless `live.devices` says so.

    Raises:
      ConfigError: too few devices, or devices for a model that is no JAX program.
      ValueError: as `saex.harvest.harvest`.
    """
    devices = _devices(live.devices, mesh, is_compiled(model))
    cfg = settle(model, harvest, sites)
    columns = columns_of(model, source, cfg)
    meta = describe(model, params, source, "train", cfg, seed)
    contexts = choose(model, source, "train", cfg, seed)
    tee = None
    if live.tee:
        open_writer = functools.partial(
            StoreWriter, path, columns, {**meta, "kind": "tee"}, chunk_rows=cfg.chunk_rows,
            max_buffer_bytes=buffer_bytes(columns, cfg),
        )  # fmt: skip

        def room(rows: int) -> str:
            needed = bytes_needed(columns, rows, cfg.segment_rows, cfg.chunk_rows)
            return check_room(path, needed, enforce=cfg.check_room)

        order = seed if cfg.shuffle else None
        tee = Tee(Path(path), open_writer, cfg.segment_rows, order, room)
    manifest = Manifest(columns, cfg.chunk_rows, {**meta, "kind": "live"}, complete=True)
    return LiveRows(
        path, manifest, contexts, make_forward(model, cfg), params, batch=cfg.batch,
        compiled=is_compiled(model), wanted=tuple(sites),
        devices=devices, tee=tee,
    )  # fmt: skip


def open_stream(config: Any, store: Any, mesh: Any, sample: int, cache: Path | None = None) -> Any:
    """The stream of a run over its store; of a live source, which then knows what is needed.

    Args:
      config: the run's `saex.config.Config`.
      store: what holds or makes the rows.
      mesh: the run's.
      sample: rows that initial values are taken from.
      cache: as `Stream.open`.

    Raises:
      StoreError: as `Stream.open`; the tee's folder holds another store.
    """
    stream = config.stream.open(store, config.reads, config.order_seed, mesh, cache=cache)
    if isinstance(store, LiveRows):
        store.plan(stream, config.n_steps, sample)
        epochs = config.n_steps * stream.batch / stream.rows
        log.info("live: %d rows of text for %.4g epochs", stream.rows, epochs)
        if epochs > 1:
            log.info(
                "the text ends before the run: it is read again, in another order each time; "
                "harvest.rows and the text bound it"
            )
    return stream


@contextlib.contextmanager
def finishing(store: Any) -> Iterator[None]:
    """Completes what a live source writes when the block ends well; lets go of it in any case."""
    if not isinstance(store, LiveRows):
        yield
        return
    try:
        yield
        store.finish()
    finally:
        store.close()


def check_live(config: Any) -> None:
    """Refuses what a live source cannot do, before a device is touched.

    Raises:
      ValueError: names the field of the run's configuration, and the mend.
    """
    if not config.live.enabled:
        if config.live.tee:
            raise ValueError("live.tee=True without live.enabled=True: a harvest writes anyway")
        return
    if config.subject is None:
        raise ValueError("live.enabled with subject=None: name the model that makes the rows")
    if config.stream.max_norm:
        raise ValueError(
            f"live.enabled with stream.max_norm={config.stream.max_norm}: the median norm of rows "
            "that are not made yet is not known; harvest into a store first, or set max_norm=0"
        )
    if config.harvest.non_finite == "drop":
        raise ValueError(
            "live.enabled with harvest.non_finite='drop': which rows are dropped would be known "
            "too late for a fixed order; use 'refuse', or harvest into a store first"
        )
    if config.harvest.dtype == "int8":
        raise ValueError(
            "live.enabled with harvest.dtype='int8': rows that are not stored need no fewer bytes; "
            "use 'bfloat16', or harvest into a store first"
        )


def _devices(count: int, mesh: Any, compiled: bool) -> list[Device]:
    """The devices of this process that the subject model runs on."""
    here = jax.local_devices()
    if count and not compiled:
        raise ConfigError(
            f"live.devices={count}: this subject model is no JAX program, and runs where "
            "subject.device says; leave live.devices=0"
        )
    if count > len(here):
        raise ConfigError(f"live.devices={count}: this process has {len(here)} devices")
    if count:
        return here[-count:]
    if mesh is None:
        return here[:1]
    return [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
