"""Several dictionaries of equal shapes trained in one program, on one stream.

Members may differ in seed, learning rate and whatever their method's ``hyper`` has. Each keeps a
state of its own, in two layouts that may be combined: *slots*, states one behind the other in one
program (unrolled: a member costs what it costs alone), and, on a mesh with a sweep axis, *places*,
parts of the mesh that work at the same time. Member m is on place m % sweep of slot m // sweep.

A member whose loss is not finite has no gradient in that step (``make_step``), so that what is
finite stays so; it has failed, and the loop saves and evaluates nothing of it from there on. Its
numbers of before are not kept: that would be a pass over old and new behind the optimiser's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saex.sharding import SWEEP, member_axis
from saex.train.optim import Optim
from saex.train.step import update


def make_stack_step(sae: Any, optim: Optim, steps: int) -> Callable:
    """The jitted, donated step (slots, batch, keys, hypers) -> (slots, metrics).

    slots, keys, hypers and metrics are tuples, one entry per slot, each as ``make_step`` has it;
    on a mesh with a sweep axis their arrays have a leading axis of members.
    """
    one = update(sae, optim, steps)

    def step_fn(slots, batch, keys, hypers):
        done = [one(state, batch, *rest) for state, *rest in zip(slots, keys, hypers)]
        return tuple(state for state, _ in done), tuple(metrics for _, metrics in done)

    return jax.jit(step_fn, donate_argnums=0)


def places(mesh: Any) -> int:
    """Members that work side by side on the mesh."""
    return mesh.shape[SWEEP] if member_axis(mesh) else 1


def place_of(mesh: Any, m: int) -> Any:
    """The mesh of data and model that member m is on."""
    if not member_axis(mesh):
        return mesh
    devices = mesh.devices[m % places(mesh)]
    return jax.sharding.Mesh(devices, mesh.axis_names[1:], axis_types=mesh.axis_types[1:])


def join(members: Sequence[Any], mesh: Any) -> tuple[Any, ...]:
    """The slots of members' trees, each of which lies on its own place or on no mesh.

    Raises:
      ValueError: the sweep axis of the mesh does not divide the number of members.
    """
    size = places(mesh)
    if len(members) % size:
        raise ValueError(
            f"{len(members)} members cannot be spread over mesh.sweep={size}: use a multiple of it"
        )
    if not member_axis(mesh):
        return tuple(members)
    groups = [members[i : i + size] for i in range(0, len(members), size)]
    return tuple(jax.tree.map(lambda *leaves: _join(leaves, mesh), *group) for group in groups)


def member(slots: Sequence[Any], m: int, mesh: Any) -> Any:
    """Member m's tree, on its place."""
    if not member_axis(mesh):
        return slots[m]
    size = places(mesh)
    return jax.tree.map(lambda leaf: _part(leaf, m % size, place_of(mesh, m)), slots[m // size])


def metrics_of(metrics: Sequence[Any], m: int, mesh: Any) -> dict[str, Any]:
    """Member m's scalars, from a step's metrics."""
    if not member_axis(mesh):
        return metrics[m]
    return {k: np.asarray(v)[m % places(mesh)] for k, v in metrics[m // places(mesh)].items()}


def _join(leaves: Sequence[Any], mesh: Any) -> jax.Array:
    """One array [members, ...] of arrays on the places of the mesh, without communication."""
    devices = [getattr(leaf, "devices", set)() for leaf in leaves]
    if sum(map(len, devices)) != mesh.size or set().union(*devices) != set(mesh.devices.flat):
        # numbers and keys, which lie on one device or on all of them
        return jax.device_put(jnp.stack(leaves), jax.NamedSharding(mesh, jax.P(SWEEP)))
    where: Any = leaves[0].sharding
    sharding = jax.NamedSharding(mesh, jax.P(SWEEP, *where.spec))
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    parts = [_alone(jnp.expand_dims, shard, 0) for shard in shards]
    shape = (len(leaves), *leaves[0].shape)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _part(leaf: jax.Array, place: int, mesh: Any) -> jax.Array:
    """One member of a joined array, on its own mesh."""
    where: Any = leaf.sharding
    sharding = jax.NamedSharding(mesh, jax.P(*where.spec[1:]))
    shards = [s for s in leaf.addressable_shards if s.index[0].start == place]
    parts = [_alone(jnp.squeeze, shard, 0) for shard in shards]
    return jax.make_array_from_single_device_arrays(leaf.shape[1:], sharding, parts)


def _alone(fn: Callable, shard: Any, *args: Any) -> jax.Array:
    """``fn`` of one device's data, whatever mesh is in context."""
    mesh: Any = jax.sharding.Mesh([shard.device], ("alone",))
    if isinstance(shard.data.sharding, jax.NamedSharding):  # the only device of its place
        mesh = shard.data.sharding.mesh
    with jax.set_mesh(mesh):
        return fn(shard.data, *args)
