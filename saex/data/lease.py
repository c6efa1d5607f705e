"""Memory for batches, used again once nobody holds a batch that lies in it.

Fresh memory is slow: its first touch runs at a tenth of the speed of a copy. A batch cannot simply
be written over either, since on CPU a jax.Array may lie in the memory of the numpy array it was
made of. So a block comes back by itself, when the last array that refers to it is gone.
"""

from __future__ import annotations

import collections
import ctypes
import weakref
from typing import Any

import numpy as np

# JAX on CPU takes over memory that is aligned like this, and copies other memory.
_ALIGNMENT = 64
# Blocks of one size that are kept when they come back; more are freed.
_KEPT = 16


class Lease:
    """Gives arrays whose memory comes back by itself. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: dict[int, collections.deque[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with whatever was in its memory, as `np.empty`. It is the caller's for good:
        its memory is not used for another one while it, a view or a jax.Array of it lives.
        """
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size == 0:
            return np.empty(shape, dtype)
        free = self._free.setdefault(size, collections.deque(maxlen=_KEPT))
        try:
            memory = free.pop()
        except IndexError:
            memory = _aligned(size)
        # Arrays keep a ctypes block alive, not each other's bases, and its end can be watched.
        block: Any = (ctypes.c_char * size).from_buffer(memory.data)
        weakref.finalize(block, free.append, memory).atexit = False
        return np.frombuffer(block, np.uint8).view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size]
