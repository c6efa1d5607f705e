"""Leased memory: back when it is free, and never a moment earlier."""

import gc

import jax
import ml_dtypes
import numpy as np

from saex.data.lease import Lease

BF16 = np.dtype(ml_dtypes.bfloat16)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_last_view_is_gone():
    lease = Lease()
    first = lease.empty((100, 8), BF16)
    assert first.shape == (100, 8) and first.dtype == BF16 and first.flags.writeable
    at, view = address(first), first[3:5, :2].view(np.uint16)
    assert at % 64 == 0
    del first
    other = lease.empty((100, 8), BF16)
    assert address(other) != at, "a view still lies in it"
    del view
    gc.collect()
    assert address(lease.empty((200, 4), BF16)) == at


def test_a_jax_array_keeps_its_memory():
    lease, held = Lease(), []
    for i in range(40):
        rows = lease.empty((64, 32), np.dtype(np.float32))
        rows[:] = i
        held.append(jax.device_put(rows))
        del rows
    assert all((np.asarray(x) == i).all() for i, x in enumerate(held))
    del held
    gc.collect()
    for _ in range(40):
        x = jax.jit(lambda x: x + 1)(jax.device_put(lease.empty((64, 32), np.dtype(np.float32))))
        assert x.shape == (64, 32)


def test_no_rows_and_many_sizes():
    lease = Lease()
    assert lease.empty((0, 8), BF16).shape == (0, 8)
    arrays = [lease.empty((n,), np.dtype(np.int32)) for n in range(1, 50)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert all((array == i).all() for i, array in enumerate(arrays))
