"""The largest of each row by a sorting network: no branch, every step one loop over all rows.

Batcher's bitonic network ("Sorting networks and their applications", 1968). Entries are the
leading axis and rows the last, so that comparing neighbours is comparing vectors. A key and its
index are one 64-bit integer: a comparison is a maximum and a minimum, and ties are settled by it.
XLA would compute the network anew for every output of a loop; barriers end its loops.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

LAST = 2**31 - 1  # as an index, it loses to all


def largest(
    keys: Int[Array, "w b"], indices: Int[Array, "w b"], m: int, in_order: bool
) -> tuple[Int[Array, "m b"], Int[Array, "m b"]]:
    """The ``m`` largest keys of each row, and their indices; among equals the lower index wins.

    Args:
      keys: int32, w of a row. indices: int32, not negative, no two of a row alike.
      m: a power of two. Where w is less, the rest is filled with (least int32, LAST).
      in_order: whether they come out sorted, largest first; if not, in no order.
    """
    with jax.enable_x64(True):
        high = jax.lax.shift_left(keys.astype(jnp.int64), jnp.int64(32))
        pairs = _first(_barrier(high + (LAST - indices.astype(jnp.int64))), m, in_order)
        keys = jax.lax.shift_right_arithmetic(pairs, jnp.int64(32)).astype(jnp.int32)
        return keys, (LAST - (pairs & jnp.int64(2**32 - 1))).astype(jnp.int32)


def _first(x: Int[Array, "w b"], m: int, in_order: bool) -> Int[Array, "m b"]:
    runs = 1 << (-(-len(x) // m) - 1).bit_length()
    lowest = jnp.int64(-(2**63))
    x = jnp.pad(x, ((0, runs * m - len(x)), (0, 0)), constant_values=lowest)
    length = 1
    while length < m:  # two sorted runs, the second turned, are a bitonic one
        a, b = _parts(x, 2, length)
        x, length = _sorted(_joined(_exchanged(a, b[:, ::-1])), length // 2), 2 * length
    while len(x) > m:
        a, b = _parts(x, 2, m)
        x = _joined([jnp.maximum(a, b[:, ::-1])])
        if in_order or len(x) > m:
            x = _sorted(x, m // 2)
    return x


def _sorted(x: Int[Array, "w b"], half: int) -> Int[Array, "w b"]:
    """Bitonic runs of ``2 * half`` sorted; two steps of the network a loop."""
    while half > 1:
        a, b, c, d = _parts(x, 4, half // 2)
        (a, c), (b, d) = _exchanged(a, c), _exchanged(b, d)
        x, half = _joined([*_exchanged(a, b), *_exchanged(c, d)]), half // 4
    return _joined(_exchanged(*_parts(x, 2, 1))) if half else x


def _parts(x: Int[Array, "w b"], count: int, size: int) -> list[Int[Array, "t size b"]]:
    """``count`` neighbours of ``size`` entries each, from every stretch of so many."""
    x = x.reshape(-1, count, size, x.shape[-1])
    return [x[:, j] for j in range(count)]


def _joined(parts: list[Int[Array, "t size b"]]) -> Int[Array, "w b"]:
    x = jnp.stack(parts, axis=1)
    return _barrier(x.reshape(-1, x.shape[-1]))


def _exchanged(a: jax.Array, b: jax.Array) -> list[jax.Array]:
    return [jnp.maximum(a, b), jnp.minimum(a, b)]


_barrier = jax.lax.optimization_barrier
