"""Windows of a live source, put together on the devices that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saex.data.manifest import Column
from saex.data.resident import Device


class Assembly:
    """Rows of forward passes one behind the other, on each of some devices.

    Attributes:
      columns: what is put together.
      arrays: {column: {device: [>= rows, *shape]}}; the last rows may be of no position.
    """

    def __init__(self, columns: Mapping[str, Column], rows: int, devices: Sequence[Device]):
        """Begins with nothing; memory is taken with the first pass.

        Args:
          columns: what is put together.
          rows: of all passes, and as many as one pass has positions.
          devices: where.
        """
        self.columns, self._rows, self._devices = dict(columns), rows, tuple(devices)
        self.arrays: dict[str, dict[Device, jax.Array]] = {name: {} for name in columns}

    def add(self, acts: Mapping[str, jax.Array], lengths: np.ndarray, at: int) -> list[str]:
        """Puts the rows of one forward pass at place `at`; names columns with NaN or infinity.

        Args:
          acts: {column: [contexts, positions, *shape]}; of columns that are not put together it
            is only looked at whether they are finite.
          lengths: [contexts] positions that count.
          at: from 0.
        """
        shape = next(iter(acts.values())).shape[:2]
        counts = _counts(shape, lengths)
        finite = {name: _finite(x, jax.device_put(counts, x.device)) for name, x in acts.items()}
        for name, arrays in self.arrays.items():
            for device in self._devices:
                x, places = jax.device_put((acts[name], counts), device)
                before = arrays.get(device)
                if before is None:
                    before = self._empty(name, device)
                arrays[device] = _put(before, x, places, jax.device_put(np.int32(at), device))
        return [name for name, fine in finite.items() if not bool(fine)]

    def _empty(self, name: str, device: Device) -> jax.Array:
        column = self.columns[name]
        return jnp.zeros((self._rows, *column.shape), column.numpy_dtype, device=device)


def _counts(shape: tuple[int, ...], lengths: np.ndarray) -> np.ndarray:
    """int32 [contexts * positions]: places of the positions that count, filled up with place 0,
    which counts in every context: each has a first token.
    """
    inside = np.zeros(shape, bool)
    inside[: len(lengths)] = np.arange(shape[1])[None] < lengths[:, None]
    places = np.flatnonzero(inside)
    return np.pad(places, (0, inside.size - len(places))).astype(np.int32)


@jax.jit
def _finite(x, places):
    return jnp.isfinite(x.reshape(-1, *x.shape[2:])[places]).all()


def _put_rows(before, x, places, at):
    """The rows at `places`, written behind row `at`; what follows is written over next time."""
    rows = x.reshape(-1, *x.shape[2:])[places]
    return jax.lax.dynamic_update_slice_in_dim(before, rows, at, axis=0)


_put = jax.jit(_put_rows, donate_argnums=0)
