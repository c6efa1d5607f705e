"""The stream: shuffled batches from a store, on the mesh, from any step. The only user of grain."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from saex.data import joined
from saex.data.exclude import DEFAULT_POSITIONS, Kept, resolve
from saex.data.kept_cache import resolve_once
from saex.data.lanes import Lanes, parts_of
from saex.data.lease import Lease
from saex.data.manifest import Column
from saex.data.mixed import Mixed
from saex.data.mixing import ENOUGH, WHOLE, measured
from saex.data.resident import Resident, check_resident
from saex.data.split import DOCUMENT, Part
from saex.data.store import Store
from saex.data.store_remote import is_remote
from saex.data.stream_checks import check_lanes, check_mesh, check_rows, check_store
from saex.data.windows import Windows
from saex.registry import run_field
from saex.sharding import DATA

log = logging.getLogger("saex")

# The sequence is endless; grain wants a length.
_ENDLESS = 2**48


@dataclass(frozen=True)
class Stream:
    """How rows become batches.

    Attributes:
      batch: rows per step, over all processes.
      window: chunks of the store that are shuffled together in memory; 0: 64, or as many more as
        131,072 rows need. So many bf16 rows of width 768 take 201 MB, three times. Rows of a chunk
        come from one segment, so a batch is mixed the better the fewer rows of each chunk it has.
      lanes: independent sequences that every batch is made of in equal parts. A process reads the
        lanes of its own rows and no others, so a number that the number of processes divides; the
        batches are the same for any such number.
      exclude_positions: positions in the context that are not streamed; position 0 is an attention
        sink in many models. Stores without positions (rows that are not text) are not filtered.
      exclude_tokens: token ids that are not streamed.
      exclude: column -> values by which rows are not streamed, such as {"label": (3, 7)}; of any
        column of one whole number a row.
      max_norm: rows are not streamed whose norm, in one of the columns that are streamed, is more
        than this many times the median norm of the store's rows; 0: all are. It needs the norms
        that a harvest writes.
      threads: threads that make batches; 0 makes each one when it is asked for.
      prefetch: batches made ahead.
      on_device: whether windows lie on the devices that train, and batches are picked there: for
        accelerators with memory for two windows, where the host is slow to shuffle. The batches
        are the same. One process, one store, no int8.
      checksums: whether the CRC of every chunk is checked as it is read. Off, `saex store verify`
        looks for altered bytes; files that are gone, cut short or changed under the run are
        refused either way.
    """

    batch: int = 4096
    window: int = 0
    lanes: int = 8
    exclude_positions: tuple[int, ...] = DEFAULT_POSITIONS
    exclude_tokens: tuple[int, ...] = ()
    exclude: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    max_norm: float = 0.0
    threads: int = run_field(1)
    prefetch: int = run_field(4)
    on_device: bool = run_field(False)
    checksums: bool = run_field(False)

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1), ("window", 0), ("lanes", 1), ("threads", 0), ("prefetch", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"stream.{name}={getattr(self, name)}: at least {least} is needed")
        if self.batch % self.lanes:
            raise ValueError(
                f"stream.batch={self.batch} is not a multiple of stream.lanes={self.lanes}: use "
                f"{-(-self.batch // self.lanes) * self.lanes}, or fewer lanes"
            )
        if not 0 <= self.max_norm < float("inf"):
            raise ValueError(f"stream.max_norm={self.max_norm}: 0 (no limit) or a number above it")

    def open(
        self,
        store: Store | Part | Mixed,
        columns: Mapping[str, str] | Sequence[str],
        seed: int,
        mesh: Any = None,
        dtype: str | None = None,
        cache: Path | None = None,
    ) -> Batches:
        """Opens the stream of some columns of a store.

        Args:
          store: a complete store.
          columns: names in the batch -> columns of the store, such as
            `{"x": "blocks.1.resid_post"}`; a sequence keeps the names. "a+b" are two columns
            side by side (`saex.data.joined`).
          seed: the order's, any integer from 0.
          mesh: batches are sharded over its data axis; None: arrays on the default device.
          dtype: what floating-point columns are cast to; None: as they are stored.
          cache: folder in which it is remembered which rows the rules leave in.

        Raises:
          StoreError: the store is not complete, lacks a column, or holds too few rows.
          ValueError: the batch cannot be split over the data axis of the mesh.
        """
        names = dict(columns) if isinstance(columns, Mapping) else {n: n for n in columns}
        check_store(store, names)
        check_mesh(self.batch, mesh)
        check_lanes(self.lanes, jax.process_count())
        if seed < 0:
            raise ValueError(f"seed={seed}: a seed is a whole number from 0")
        return Batches(self, store, names, seed, mesh, dtype, cache)


class Batches:
    """An open stream. Batch i depends on the store, the section, the seed and i alone.

    So there is nothing to save but the step: after a restart `iterate(step)` goes on.

    Attributes:
      info: what will be streamed and what is left out, for the log.
      batch: rows per batch.
      rows: rows per epoch, of all stores. Rows left over at its end open the next epoch's first
        batch; with several lanes its last batch holds them, each in its lane's place.
      steps_per_epoch: rows / batch, as a float.
    """

    def __init__(
        self,
        config: Stream,
        store: Store | Part | Mixed,
        names: dict[str, str],
        seed: int,
        mesh: Any,
        dtype: str | None,
        cache: Path | None = None,
    ):
        self.batch = config.batch
        self._config, self._names, self._store, self._seed = config, names, store, seed
        self._columns = {name: joined.column(store, stored) for name, stored in names.items()}
        self._stored = {part: store.column(part) for part in _parts(names)}
        self._dtypes = {n: _dtype(c, dtype) for n, c in self._columns.items()}
        self._kept = [self._resolve(one, cache) for one in parts_of(store)[0]]
        self.rows = sum(int(kept.counts.sum()) for kept in self._kept)
        check_rows(store, self.rows, config.batch)
        self._lanes = self._open_lanes(sorted(self._stored))
        self._lease = Lease()
        self._sharding = None if mesh is None else NamedSharding(mesh, jax.P(DATA))
        self._resident = self._open_resident() if config.on_device else None
        self.steps_per_epoch = self.rows / self.batch
        self.info = {
            **self._counts(),
            "steps_per_epoch": self.steps_per_epoch,
            "windows_per_epoch": self._lanes.windows,
            "window_rows": self._lanes.rows,
            "window_bytes": self._lanes.nbytes,
        }
        # A sample of rows is read one by one, which takes too long over a network.
        if not any(s.rows > WHOLE and is_remote(s.path) for s in parts_of(store)[0]):
            self.info |= self._told(self.mixing())

    def mixing(self, steps: int = 4) -> dict[str, float]:
        """Different documents in a batch: the mean of the first `steps` batches, and the mean of
        batches that are drawn at random from all rows, the same share of each store (for stores
        of more than 2^26 rows estimated). {} where a store has no documents.
        """
        if DOCUMENT not in self._store.columns:
            return {}
        lanes, steps = self._open_lanes([DOCUMENT]), max(1, min(steps, self.rows // self.batch))
        try:
            return measured(lanes, parts_of(self._store)[0], self._kept, self.batch, steps)
        finally:
            lanes.close()

    def _resolve(self, store: Store | Part, cache: Path | None) -> Kept:
        config = self._config
        rules = {
            "positions": config.exclude_positions,
            "tokens": config.exclude_tokens,
            "max_norm": config.max_norm,
            "sites": sorted(name for name, column in self._stored.items() if column.shape),
            "values": config.exclude,
        }
        return resolve_once(cache, store, rules, lambda: resolve(store, **rules))

    def _open_lanes(self, columns: list[str], make: Callable[..., Windows] = Windows) -> Lanes:
        config = self._config
        return Lanes(
            self._store, self._kept, columns, batch=config.batch, lanes=config.lanes,
            window=config.window, seed=self._seed, checksums=config.checksums, make=make,
        )  # fmt: skip

    def _open_resident(self) -> Resident:
        check_resident(self._stored, len(self._kept))
        open_lanes = functools.partial(self._open_lanes, sorted(self._stored))
        config = self._config
        return Resident(
            open_lanes, self._names, self._dtypes, config.batch, config.lanes, self._sharding
        )

    def _told(self, mixing: dict[str, float]) -> dict[str, float]:
        """The same, with a warning where batches are worse mixed than by a random draw."""
        found, random = mixing.values() if mixing else (1, 1)
        if found < ENOUGH * random:
            log.warning(
                "%s: a batch has rows of %.0f documents, one drawn at random from all rows would "
                "have %.0f. Neighbouring rows are alike: shuffle more of them together, by a "
                "larger stream.window (now %d rows) or by a harvest with larger segment_rows or "
                "smaller chunk_rows", self._store.path, found, random, self._lanes.rows,
            )  # fmt: skip
        return mixing

    def _counts(self) -> dict[str, Any]:
        """What is kept; of several stores the numbers of each, and their shares of a batch."""
        if not isinstance(self._store, Mixed):
            return self._kept[0].info
        found: dict[str, Any] = {"rows": self._store.rows, "rows_kept": self.rows}
        for i, (store, kept) in enumerate(zip(self._store.stores, self._kept)):
            one = {"path": str(store.path), "share": self._store.weights[i], **kept.info}
            found |= {f"stores/{i}/{name}": value for name, value in one.items()}
        return found

    def batch_at(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step, made now: {name: [batch, *shape]}, rows over the data axis.

        Raises:
          StoreError: the store is damaged; names the file.
        """
        if self._resident is not None:
            return self._resident.batch_at(step)
        start = step * self.batch
        if self._sharding is None:
            rows = self.gather(start, start + self.batch)
            return {name: jax.device_put(values) for name, values in rows.items()}
        parts = {
            part: self.gather(start + part[0], start + part[1]) for part in sorted(self._parts())
        }
        return {name: self._assemble(name, parts) for name in self._names}

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, jax.Array]]:
        """Batches from `start_step` on without end, made ahead by threads."""
        import grain

        options = grain.ReadOptions(
            num_threads=self._config.threads,
            prefetch_buffer_size=self._config.prefetch if self._config.threads else 0,
        )
        iterator = iter(grain.MapDataset.source(_Steps(self)).to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        try:
            yield from iterator
        finally:
            getattr(iterator, "close", lambda: None)()

    def gather(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows [start, stop) of the endless sequence, {name: [stop - start, *shape]} in numpy.

        Batch i is the rows from i * batch on. The arrays are the caller's: nothing else uses their
        memory, which matters because a jax.Array may lie in the memory of the array it was made of.

        Raises:
          StoreError: the store is damaged; names the file.
        """
        rows, stored = stop - start, self._stored
        out = {c: self._lease.empty((rows, *k.shape), k.numpy_dtype) for c, k in stored.items()}
        self._lanes.gather(start, stop, out)
        return {n: self._join(n, [out[c] for c in joined.parts(s)]) for n, s in self._names.items()}

    def _join(self, name: str, columns: list[np.ndarray]) -> np.ndarray:
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        return cast(whole, self._dtypes[name])

    def windows(self, rows: int, lane: int) -> Iterator[np.ndarray]:
        """Of each window of a lane that the first `rows` rows come from, the numbers of its chunks,
        int64.
        """
        return self._lanes.windows_of(rows, lane)

    @property
    def lane_processes(self) -> list[int]:
        """The process that each lane's rows go to; of several the first."""
        lanes, share = self._config.lanes, self.batch // self._config.lanes
        if self._sharding is None:
            return [jax.process_index()] * lanes
        indices = self._sharding.devices_indices_map((self.batch,)).items()
        held = [(d.process_index, *i[0].indices(self.batch)[:2]) for d, i in indices if i]
        return [
            min(p for p, low, high in held if low < (lane + 1) * share and lane * share < high)
            for lane in range(lanes)
        ]

    def sample(self, rows: int) -> dict[str, np.ndarray]:
        """The first rows of the stream, for what is initialised from data; at most an epoch."""
        rows = min(rows, self.rows)
        if self._resident is None:
            return self.gather(0, rows)
        parts = [jax.device_get(self.batch_at(i)) for i in range(-(-rows // self.batch))]
        return {n: np.concatenate([p[n] for p in parts])[:rows] for n in self._names}

    def close(self) -> None:
        """Stops reading ahead and frees the windows. Batches handed out stay good."""
        self._lanes.close()
        if self._resident is not None:
            self._resident.close()

    def _parts(self) -> set[tuple[int, int]]:
        """The row ranges of a batch that this process's devices hold."""
        assert self._sharding is not None
        indices = self._sharding.addressable_devices_indices_map((self.batch,))
        return {index[0].indices(self.batch)[:2] for index in indices.values() if index}

    def _assemble(self, name: str, parts: dict[tuple[int, int], dict[str, np.ndarray]]):
        assert self._sharding is not None

        def part(index: Any) -> np.ndarray:
            return parts[index[0].indices(self.batch)[:2]][name]

        shape = (self.batch, *self._columns[name].shape)
        return jax.make_array_from_callback(shape, self._sharding, part)


class _Steps:
    """Batches as a grain source: one element is a whole batch, 13 to 60 times faster than rows."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, jax.Array]:
        return self._batches.batch_at(int(index))


def rows(
    store: Store | Part | Mixed,
    columns: Mapping[str, str] | Sequence[str],
    start: int = 0,
    stop: int | None = None,
    batch: int = 4096,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads rows [start, stop) in their order, `batch` at a time (the last may be shorter).

    Every row is given, also what a stream would exclude. Yields {name: [rows, *shape]}.

    Raises:
      StoreError: a column that is not there, rows outside the store, or a damaged file.
    """
    names = dict(columns) if isinstance(columns, Mapping) else {n: n for n in columns}
    stop = store.rows if stop is None else stop
    for stored in names.values():
        joined.column(store, stored)
    for at in range(start, stop, batch):
        end = min(at + batch, stop)
        yield {name: joined.read(store, stored, at, end) for name, stored in names.items()}


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values.astype(dtype)`; bfloat16 to float32 by shifting bits, several times faster."""
    if values.dtype.name == "bfloat16" and dtype == np.float32:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype, copy=False)


def _dtype(column: Column, dtype: str | None) -> np.dtype:
    cast_to = dtype if column.is_float else None
    return column.numpy_dtype if cast_to is None else Column(dtype=cast_to).numpy_dtype


def _parts(names: Mapping[str, str]) -> set[str]:
    return {part for stored in names.values() for part in joined.parts(stored)}
