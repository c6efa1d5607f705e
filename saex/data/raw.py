"""The bytes of an uncompressed shard, read straight into memory that is there already.

A shard is chunks at the offsets of its index, so no library is needed to read one, and none reads
it faster: tensorstore checks a CRC of every chunk (which costs about as much as the reading) and
`os.pread` makes a new object each time (whose memory is touched for the first time).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

# Several requests are under way at once, which is what disks and file servers want.
_THREADS = 4
# Of a job for one thread. Linux takes at most 1024 buffers in a call, and each chunk takes two.
_JOB_BYTES, _JOB_CHUNKS = 2**23, 500
# Lots that the jobs of a call are dealt out in, for each thread.
_LOTS = 8
# Linux gives what is in memory at once, or says that it is not; elsewhere nothing is asked so.
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
_CRC = 4
# Bytes of a chunk of numbers: smaller ones are read together and copied.
_SMALL = 2**12


class Changed(ValueError):
    """A file is not the one that was opened."""


@dataclass(frozen=True)
class Shard:
    """One data file, as it was when the store was opened.

    Attributes:
      file: its path; one on an object store is not read from here.
      offsets: [chunks] int64, where each chunk begins.
      chunk_rows: rows of a chunk.
      row_bytes: bytes of a row.
      stamp: size, time of the last change and inode; a file with another stamp is refused.
    """

    file: Any
    offsets: np.ndarray
    chunk_rows: int
    row_bytes: int
    stamp: tuple[int, int, int]

    def read(self, start: int, stop: int, out: np.ndarray, flags: int = 0) -> None:
        """Reads rows [start, stop) into `out` [stop - start, *shape], contiguous.

        Args:
          start, stop: rows.
          out: where they go.
          flags: of preadv.

        Raises:
          OSError: the file is gone or cannot be read; BlockingIOError: `flags` has RWF_NOWAIT, and
            not all of it is in memory.
          ValueError: it was changed since the store was opened, or cut short.
        """
        target = out.reshape(-1).view(np.uint8).data
        fd = os.open(self.file, os.O_RDONLY)
        try:
            if stamp(os.fstat(fd)) != self.stamp:
                raise Changed("was changed after the store was opened")
            if not self._read_small(fd, start, stop, target, flags):
                for offset, views in self._runs(start, stop, target):
                    _fill(fd, views, offset, flags)
        finally:
            os.close(fd)

    def _read_small(self, fd: int, start: int, stop: int, target: memoryview, flags: int) -> bool:
        """Reads small chunks with their CRCs and copies the rows, where chunks follow each other in
        the file; whether it did. A buffer for each of them would take longer.
        """
        size, first = self.chunk_rows * self.row_bytes, start // self.chunk_rows
        offsets = self.offsets[first : -(-stop // self.chunk_rows)]
        if start % self.chunk_rows or size > _SMALL or len(offsets) < 2:
            return False
        if (np.diff(offsets) != size + _CRC).any():
            return False
        chunks = np.empty((len(offsets), size + _CRC), np.uint8)
        _fill(fd, [chunks.reshape(-1).data], int(offsets[0]), flags)
        full = len(target) // size
        np.frombuffer(target, np.uint8, full * size).reshape(-1, size)[:] = chunks[:full, :size]
        target[full * size :] = chunks[-1, : len(target) - full * size].data
        return True

    def _runs(self, start: int, stop: int, target: memoryview):
        """(offset, buffers) of each stretch of the file without a gap: rows, CRC, rows, CRC..."""
        at, end, offset, views = 0, -1, 0, []
        while start < stop:
            chunk, skip = divmod(start, self.chunk_rows)
            rows = min(stop - start, self.chunk_rows - skip)
            size, begin = rows * self.row_bytes, int(self.offsets[chunk]) + skip * self.row_bytes
            if begin == end + _CRC and views:
                views.append(memoryview(bytearray(_CRC)))
            else:
                if views:
                    yield offset, views
                offset, views = begin, []
            views.append(target[at : at + size])
            start, at, end = start + rows, at + size, begin + size
        if views:
            yield offset, views


@dataclass(frozen=True)
class Job:
    """Rows [start, stop) of a segment's shard, and where they go."""

    shard: Shard
    start: int
    stop: int
    out: np.ndarray


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What tells a changed file from the one before, without reading it."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy copies its own dtypes faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def cut(job: Job) -> list[Job]:
    """The job in pieces that are worth a thread each."""
    chunk_bytes = max(1, job.shard.chunk_rows * job.shard.row_bytes)
    step = max(1, min(_JOB_BYTES // chunk_bytes, _JOB_CHUNKS)) * job.shard.chunk_rows
    if job.start % step + job.stop - job.start <= step:
        return [job]
    places = [job.start, *range(job.start - job.start % step + step, job.stop, step), job.stop]
    return [
        Job(job.shard, a, b, job.out[a - job.start : b - job.start])
        for a, b in itertools.pairwise(places)
        if a < b
    ]


def run(jobs: Sequence[Job]) -> list[Exception | None]:
    """Reads all jobs; for each None or the OSError or ValueError that it met.

    What is in memory already is read here and now, and what is not from then on side by side:
    threads that only copy stand in each other's way, and in that of who picks the rows.
    """
    done = 0
    while _NO_WAIT and done < len(jobs) and _read_from_memory(jobs[done]):
        done += 1
    return [None] * done + _run_side_by_side(jobs[done:])


def _run_side_by_side(jobs: Sequence[Job]) -> list[Exception | None]:
    if len(jobs) < 2:
        return [_attempt(job) for job in jobs]
    # Lots of jobs that follow each other: to hand over a small one takes longer than to do it.
    step = -(-len(jobs) // (_LOTS * _THREADS))
    lots = [jobs[at : at + step] for at in range(0, len(jobs), step)]
    return list(itertools.chain.from_iterable(_pool().map(_attempt_all, lots)))


def _read_from_memory(job: Job) -> bool:
    """Reads the job if all of it is in memory. Every other end is left to the next attempt."""
    try:
        job.shard.read(job.start, job.stop, job.out, _NO_WAIT)
    except (OSError, ValueError):
        return False
    return True


def _attempt_all(jobs: Sequence[Job]) -> list[Exception | None]:
    return [_attempt(job) for job in jobs]


def _attempt(job: Job) -> Exception | None:
    try:
        job.shard.read(job.start, job.stop, job.out)
    except (OSError, ValueError) as err:
        return err
    return None


def _fill(fd: int, views: list[Any], offset: int, flags: int) -> None:
    """Fills the buffers from the file; a read may stop early and is then gone on with."""
    while views:
        got = os.preadv(fd, views, offset, flags)
        if got == 0:
            raise Changed("ends early (cut short)")
        offset += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if got:
            views[0] = views[0][got:]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="saex-read")
