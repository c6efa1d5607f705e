"""Windows that lie on the devices which train, and batches that are picked there.

The host reads (or a live source makes) a window once and hands it over whole; what goes to the
devices at each step is the places of a batch's rows, four bytes each. The batches are those of
`saex.data.stream` to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saex.data import joined
from saex.data.exclude import Kept
from saex.data.lanes import Lanes, Span
from saex.data.manifest import StoreError
from saex.data.order import Order, Piece
from saex.data.windows import Window, Windows

Device = Any  # jax.Device, which type checkers take for a variable
OnDevices = Mapping[Device, jax.Array]


class DeviceWindows(Windows):
    """Windows of one lane whose buffers are {column: {device: [>= rows, *shape]}}."""

    def __init__(
        self,
        devices: Sequence[Device],
        store: Any,
        names: Sequence[str],
        order: Order,
        kept: Kept,
        reader: Executor,
        checksums: bool = False,
    ):
        """Prepares; `devices` are those that the lane's rows go to."""
        super().__init__(store, names, order, kept, reader, checksums)
        self._devices, self._most = tuple(devices), 2

    def _read(self, epoch: int, window: int) -> Window:
        with self._lock:
            self._free.clear()  # arrays on devices are not written over: let them go
        chunks, begins, ends = self._order.chunks(epoch, window)
        ranges = [(int(a), int(b)) for a, b in self._kept.chunks[chunks]]
        make = getattr(self._store, "read_to_devices", self._read_and_put)
        arrays = make(tuple(self._columns), ranges, self.rows, self._devices)
        places = self._kept.places(chunks, begins, ends)[self._order.shuffle(epoch, window)]
        return Window(arrays, places.astype(np.int32), self._columns)

    def _read_and_put(
        self, names: Sequence[str], ranges: list, rows: int, devices: Sequence[Device]
    ) -> dict[str, OnDevices]:
        """Columns of a store on each device. The memory is new: on CPU the array may be it."""
        out = {}
        for name in names:
            column = self._columns[name]
            buffer = np.empty((rows, *column.shape), column.numpy_dtype)
            self._store.read_ranges(name, ranges, buffer, self._checksums)
            out[name] = put(buffer, devices)
        return out


class Resident:
    """Makes batches from windows on devices. Safe to use from several threads."""

    def __init__(
        self,
        open_lanes: Callable[..., Lanes],
        columns: Mapping[str, str],
        dtypes: Mapping[str, np.dtype],
        batch: int,
        lanes: int,
        sharding: jax.NamedSharding | None,
    ):
        """Prepares; reads nothing yet.

        Args:
          open_lanes: makes the lanes, given what makes the windows of a lane.
          columns: names in the batch -> columns, those of one store.
          dtypes: of the batch.
          batch: rows.
          lanes: a batch has equal parts of them.
          sharding: of a batch; None: all on the first device.
        """
        self._batch, self._columns, self._sharding = batch, dict(columns), sharding
        self._parts = {jax.local_devices()[0]: (0, batch)}
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map((batch,))
            self._parts = {d: i[0].indices(batch)[:2] for d, i in indices.items() if i}
        share = batch // lanes
        where = [
            [d for d, (a, b) in self._parts.items() if a < (lane + 1) * share and lane * share < b]
            for lane in range(lanes)
        ]
        devices = iter(where)
        self._lanes = open_lanes(lambda *given: DeviceWindows(next(devices), *given))
        given = self._columns, dict(dtypes)
        self._first = jax.jit(functools.partial(_first, *given), static_argnums=2)
        self._more = jax.jit(functools.partial(_more, *given), static_argnums=4)

    def batch_at(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step, {name: [batch, *shape]}.

        Raises:
          StoreError: as reading the store does.
        """
        start = step * self._batch
        spans = {
            device: list(self._lanes.pieces_of(start + low, start + high))
            for device, (low, high) in self._parts.items()
        }
        for of_device in spans.values():
            self._lanes.want(of_device)
        made = {device: self._pick(device, parts) for device, parts in spans.items()}
        if self._sharding is None:
            return next(iter(made.values()))
        each = list(made.values())
        return {name: self._assemble([one[name] for one in each]) for name in self._columns}

    def close(self) -> None:
        """Stops reading ahead and lets go of the memory."""
        self._lanes.close()

    def _pick(self, device: Device, spans: list[tuple[Span, list[Piece]]]) -> dict[str, jax.Array]:
        """A device's rows of a batch. Shapes are the same at all steps: at the edge of a window a
        second pass fills in the rows of the next one.
        """
        sizes = tuple(span.stop - span.start for span, _ in spans)
        with contextlib.ExitStack() as held, _alone(device):
            windows = [
                [held.enter_context(self._lanes.borrow(span, piece)) for piece in pieces]
                for span, pieces in spans
            ]
            out: dict[str, jax.Array] = {}
            for turn in range(max(len(pieces) for _, pieces in spans)):
                arrays, places, filled = _turn(turn, spans, windows, device)
                places, filled = jax.device_put((places, filled), device)
                if not turn:
                    out = self._first(arrays, places, sizes)
                else:
                    out = self._more(out, arrays, places, filled, sizes)
        return out

    def _assemble(self, parts: list[jax.Array]) -> jax.Array:
        assert self._sharding is not None
        shape = (self._batch, *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, parts)


def put(buffer: np.ndarray, devices: Sequence[Device]) -> dict[Device, jax.Array]:
    """The array on each device. Nobody may write to `buffer` any more."""
    return {device: jax.device_put(buffer, device) for device in devices}


def check_resident(columns: Mapping[str, Any], stores: int) -> None:
    """Refuses what is not kept on devices.

    Raises:
      StoreError: columns with scales, several stores, or several processes.
    """
    scaled = [name for name, column in columns.items() if not column.stored]
    if scaled:
        raise StoreError(
            f"stream.on_device with the int8 columns {scaled}, which are decoded on the host: "
            "set stream.on_device=False, or harvest in bfloat16"
        )
    if stores > 1:
        raise StoreError("stream.on_device with several stores: set stream.on_device=False")
    if jax.process_count() > 1:
        raise StoreError("stream.on_device with several processes: set stream.on_device=False")


def _turn(
    turn: int,
    spans: list[tuple[Span, list[Piece]]],
    windows: list[list[Window]],
    device: Device,
) -> tuple[tuple[dict[str, jax.Array], ...], np.ndarray, np.ndarray]:
    """Of every lane the turn-th window, the places of its rows in it, and which rows these are."""
    arrays, places, filled = [], [], []
    for (span, pieces), held in zip(spans, windows):
        here, rows = min(turn, len(pieces) - 1), span.stop - span.start
        place, fill = np.zeros(rows, np.int32), np.zeros(rows, bool)
        if turn < len(pieces):
            at = sum(piece.stop - piece.start for piece in pieces[:turn])
            piece = pieces[turn]
            part = slice(at, at + piece.stop - piece.start)
            place[part], fill[part] = held[turn].order[piece.start : piece.stop], True
        arrays.append({name: on[device] for name, on in held[here].buffers.items()})
        places.append(place)
        filled.append(fill)
    return tuple(arrays), np.concatenate(places), np.concatenate(filled)


def _first(columns, dtypes, windows, places, sizes):
    """Rows of the windows at their places, lane by lane: {name: [rows, *shape]}."""
    ends = np.cumsum(sizes)[:-1].tolist()
    parts = jnp.split(places, ends)

    def rows(name):
        return jnp.concatenate([w[name][part] for w, part in zip(windows, parts)])

    out = {}
    for name, column in columns.items():
        each = [rows(part) for part in joined.parts(column)]
        out[name] = jnp.concatenate(each, axis=1) if len(each) > 1 else each[0]
    return {name: x.astype(dtypes[name]) for name, x in out.items()}


def _more(columns, dtypes, before, windows, places, filled, sizes):
    """`before`, with the rows that are `filled` from these windows."""
    new = _first(columns, dtypes, windows, places, sizes)

    def choose(old, x):
        return jnp.where(filled.reshape(-1, *[1] * (x.ndim - 1)), x, old)

    return jax.tree.map(choose, before, new)


def _alone(device: Device) -> Any:
    """A context in which one device computes, whatever mesh is set around."""
    return jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("alone",)))
