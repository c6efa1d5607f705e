"""The rows of a live source: a store whose rows a subject model makes when they are read."""

from __future__ import annotations

import collections
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from saex.contexts import Contexts, inputs_of, rows_of
from saex.data.buffer import all_finite
from saex.data.manifest import Manifest, StoreError
from saex.data.resident import Device
from saex.data.store import Store
from saex.data.store_remote import place
from saex.live_devices import Assembly
from saex.tee import Tee


class _Part(NamedTuple):
    """Rows [start, stop) of a chunk, and their place in the output."""

    chunk: int
    start: int
    stop: int
    at: int


class LiveRows(Store):
    """The rows that a harvest of the text would write, in its order, made when they are read.

    Chunk c is the c-th forward pass of that harvest, so its rows are the same to the bit. Tokens,
    documents and positions are known beforehand and cost no forward pass.

    Attributes:
      made: forward passes so far.
      windows_held: of each lane: one in use, one made ahead.
    """

    windows_held = 2

    def __init__(
        self,
        path: str | os.PathLike,
        manifest: Manifest,
        contexts: Contexts,
        forward: Callable[..., Mapping[str, jax.Array]],
        params: Any,
        *,
        batch: int,
        compiled: bool = True,
        wanted: Sequence[str],
        devices: Sequence[Device],
        tee: Tee | None = None,
    ):
        """Prepares; runs nothing yet.

        Args:
          path: of the store that the rows would be in, for messages; written by `tee` alone.
          manifest: columns and meta.
          contexts: in the order of the harvest.
          forward: (params, *`inputs_of`) -> {column: [batch, context, *shape]}.
          params: the model's.
          batch: contexts a chunk.
          compiled: whether the model is a JAX program.
          wanted: columns of the model that are read together, from one forward pass.
          devices: chunks go round them.
          tee: what writes the rows.
        """
        super().__init__(place(path), manifest)
        self.made = 0
        self._contexts, self._batch, self._tee = contexts, batch, tee
        self._compiled = compiled
        self._forward, self._params = forward, dict.fromkeys(devices, params)
        self._turn = itertools.cycle(self._params)
        self._placed: set[Device] = set()
        self._wanted = tuple(wanted)
        last = np.minimum(np.arange(batch, len(contexts) + batch, batch), len(contexts)) - 1
        self._ends = np.cumsum(contexts.lengths)[last]
        self._needed: set[bytes] | None = None
        self._aside: tuple[Any, dict[str, np.ndarray]] = (None, {})
        self._lock = threading.Lock()

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self._ends[-1])

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk, at most."""
        return int(np.diff(self._ends, prepend=0).max())

    def chunks(self) -> np.ndarray:
        """[chunks, 2] int64: row range [start, stop) of every chunk."""
        return np.stack([np.append(0, self._ends[:-1]), self._ends], axis=1)

    def chunk_segments(self) -> np.ndarray:
        """[chunks] int64: 0, as the contexts of any chunk are drawn from all."""
        return np.zeros(len(self._ends), np.int64)

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        out: np.ndarray,
        checksums: bool = False,
    ) -> int:
        """Rows [start, stop) of each range one behind the other into `out`; returns their number.

        Columns that are `wanted` together are made together: the others are kept until they are
        asked for with the same ranges. Memory for that is a window of a lane, once for each.

        Raises:
          StoreError: NaN or infinity in the activations, or rows that the run does not need.
          RuntimeError: the subject model failed; names the documents.
        """
        parts = list(self._parts(ranges))
        rows = parts[-1].at + parts[-1].stop - parts[-1].start if parts else 0
        if name in self._known(0):
            for part in parts:
                _copy(part, self._known(part.chunk)[name], out)
            return rows
        with self._lock:
            ready = self._aside[1].pop(name, None) if self._aside[0] == list(ranges) else None
            if ready is None:
                self._make_all(name, list(ranges), parts, out, rows)
            else:
                out[:rows] = ready
        return rows

    def make(self, chunks: Iterable[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Forward passes: (chunk, {column: [rows, *shape]}) for each of the chunks, in order.

        Raises:
          StoreError, RuntimeError: as `read_ranges`.
        """
        for chunk, acts in self._passes(chunks):
            yield chunk, self._rows(chunk, acts)

    def read_to_devices(
        self,
        names: Sequence[str],
        ranges: Sequence[tuple[int, int]],
        rows: int,
        devices: Sequence[Device],
    ) -> dict[str, dict[Device, jax.Array]]:
        """Whole chunks one behind the other, {column: {device: [>= rows, *shape]}}.

        Activations go from the model's device to these without a stay on the host, except for what
        the tee writes.

        Args:
          names: columns.
          ranges: of whole chunks.
          rows: at least those of the ranges; the same for all windows, so that shapes are too.
          devices: where to.

        Raises:
          StoreError, RuntimeError: as `read_ranges`.
        """
        parts = list(self._parts(ranges))
        known, out = set(self._known(0)), {}
        for name in known & set(names):
            column = self.columns[name]
            buffer = np.zeros((rows, *column.shape), column.numpy_dtype)
            self.read_ranges(name, ranges, buffer)
            out[name] = {device: jax.device_put(buffer, device) for device in devices}
        with self._lock:
            chunks = self._check_needed(parts)
            columns = {n: self.columns[n] for n in names if n not in known}
            made = Assembly(
                columns,
                rows + min(self._batch, len(self._contexts)) * self._contexts.context,
                devices,
            )
            for part, (chunk, acts) in zip(parts, self._passes(chunks) if made.columns else ()):
                begin, end = self._span(chunk)
                bad = made.add(acts, self._contexts.lengths[begin:end], part.at)
                if bad:
                    self._refuse(bad, chunk)
                if self._tee is not None and self._tee.lacks(chunk):
                    self._tee.add(chunk, self._rows(chunk, acts))
        return out | made.arrays

    def plan(self, stream: Any, steps: int, more: int = 0) -> None:
        """Says what the run will read, so that nothing beyond it is made, and what `tee` writes.

        Args:
          stream: the open stream over these rows.
          steps: of the run, from its beginning.
          more: rows that are read in any case, for initial values.
        """
        self._needed, ours, seen = set(), set(), set()
        for lane, process in enumerate(stream.lane_processes):
            trained = list(stream.windows(steps * stream.batch, lane))
            sampled = stream.windows(min(more, stream.rows), lane)
            self._needed |= {chunks.tobytes() for chunks in (*trained, *sampled)}
            chunks = {chunk for window in trained for chunk in window.tolist()} - seen
            ours |= chunks if process == jax.process_index() else set()
            seen |= chunks  # two lanes may have parts of one chunk: the first of them writes it
        if self._tee is not None:
            sizes = np.diff(self._ends, prepend=0)
            self._tee.plan(ours, int(sizes[np.array(sorted(seen), np.int64)].sum()))

    def finish(self) -> None:
        """After the last step: what the tee lacks is made and written, and its store completed."""
        if self._tee is not None:
            self._tee.finish(self.make)

    def close(self) -> None:
        """Lets go of the tee's folder."""
        if self._tee is not None:
            self._tee.close()

    def _parts(self, ranges: Sequence[tuple[int, int]]) -> Iterator[_Part]:
        at = 0
        for start, stop in ranges:
            chunk = int(np.searchsorted(self._ends, start, side="right"))
            while start < stop:
                begin = int(self._ends[chunk - 1]) if chunk else 0
                end = min(stop, int(self._ends[chunk]))
                yield _Part(chunk, start - begin, end - begin, at)
                at, start, chunk = at + end - start, end, chunk + 1

    def _make_all(
        self, name: str, ranges: list, parts: list[_Part], out: np.ndarray, rows: int
    ) -> None:
        """Makes a column into `out`, and those that are wanted with it aside."""
        chunks = self._check_needed(parts)
        others = set(self._wanted) - {name} if name in self._wanted else set()
        columns = {n: self.columns[n] for n in others}
        outs = {n: np.empty((rows, *c.shape), c.numpy_dtype) for n, c in columns.items()}
        self._aside = (None, {})
        for part, (chunk, made) in zip(parts, self.make(chunks)):
            for one, target in ((name, out), *outs.items()):
                _copy(part, made[one], target)
            if self._tee is not None and self._tee.lacks(chunk):
                self._tee.add(chunk, made)
        self._aside = (ranges, outs)

    def _check_needed(self, parts: list[_Part]) -> list[int]:
        """The chunks of the parts, if the run needs them together."""
        chunks = np.array([part.chunk for part in parts], np.int64)
        if self._needed is not None and chunks.tobytes() not in self._needed:
            raise StoreError("these rows lie beyond the end of the run and are not made")
        return chunks.tolist()

    def _passes(self, chunks: Iterable[int]) -> Iterator[tuple[int, Mapping[str, jax.Array]]]:
        """(chunk, {column: [batch, context, *shape]}), with a pass under way on every device."""
        running = collections.deque()
        for chunk in chunks:
            running.append((chunk, self._failing(chunk, self._start, chunk, next(self._turn))))
            if len(running) > len(self._params):
                yield self._done(*running.popleft())
        while running:
            yield self._done(*running.popleft())

    def _start(self, chunk: int, device: Device) -> Mapping[str, jax.Array]:
        """Starts the forward pass of a chunk."""
        if device not in self._placed:
            self._params[device] = jax.device_put(self._params[device], device)
            self._placed.add(device)
        span = self._span(chunk)
        inputs = inputs_of(self._contexts, *span, self._batch, self._compiled)
        return self._forward(self._params[device], *jax.device_put(inputs, device))

    def _done(self, chunk: int, acts: Mapping[str, jax.Array]) -> tuple[int, Any]:
        """Waits for a pass, whose errors come now."""
        self.made += 1
        return chunk, self._failing(chunk, jax.block_until_ready, acts)

    def _rows(self, chunk: int, acts: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """The rows of the positions that count, on the host."""
        rows = rows_of(self._contexts, *self._span(chunk), acts)
        bad = [name for name in acts if not all_finite(rows[name])]
        if bad:
            self._refuse(bad, chunk)
        return rows

    def _refuse(self, names: Sequence[str], chunk: int) -> None:
        raise StoreError(
            f"{', '.join(names)} is NaN or infinite in {self._where(chunk)}; mend the subject "
            "model, or harvest into a store with harvest.non_finite='drop' and train on that"
        )

    def _known(self, chunk: int) -> dict[str, np.ndarray]:
        """The columns of a chunk that need no model: tokens, documents, positions."""
        return rows_of(self._contexts, *self._span(chunk), {})

    def _span(self, chunk: int) -> tuple[int, int]:
        """The contexts of a chunk: from which to before which."""
        return chunk * self._batch, min((chunk + 1) * self._batch, len(self._contexts))

    def _where(self, chunk: int) -> str:
        documents = self._contexts.documents[slice(*self._span(chunk))]
        return f"documents {documents.min()} to {documents.max()} of the training text"

    def _failing(self, chunk: int, call: Callable, *args: Any) -> Any:
        """What `call` returns; its error with the place in the text."""
        try:
            return call(*args)
        except Exception as err:
            raise RuntimeError(
                f"the subject model failed at {self._where(chunk)} (chunk {chunk}): {err}"
            ) from err


def _copy(part: _Part, rows: np.ndarray, out: np.ndarray) -> None:
    out[part.at : part.at + part.stop - part.start] = rows[part.start : part.stop]
