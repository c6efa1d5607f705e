"""The mesh, and the one table that says which logical axis lies on which mesh axis.

Arrays are described by logical axes (``b``, ``d``, ``n``; None: never split). A strategy has two
mappings from logical to mesh axes: how parameters and optimiser state are *stored*, and how they
are laid out for *compute*. Nothing outside of this file and ``sae/ops.py`` names a mesh axis.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

DATA, MODEL, SWEEP = "data", "model", "sweep"

COMPUTE: dict[str, str] = {"b": DATA, "n": MODEL}
STORE: dict[str, dict[str, str]] = {
    "tp": {"b": DATA, "n": MODEL},  # latents split, replicated over data
    "fsdp": {"b": DATA, "n": MODEL, "d": DATA},  # the same, and rows' entries split over data
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices hold rows (``data``) and latents (``model``), and how state is stored.

    ``sweep``: groups of devices that members of a stack are spread over, each with its own mesh of
    data x model devices.
    """

    data: int = 1
    model: int = 1
    strategy: Literal["tp", "fsdp"] = "tp"
    sweep: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "model", "sweep"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}={getattr(self, name)}: at least 1 is needed")

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.model * self.sweep


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """An explicit mesh of axes (data, model) over the first ``config.size`` devices.

    With ``config.sweep`` above 1 it has a first axis more, over which only stacks are split.

    Raises:
      ValueError: fewer devices than the mesh needs.
    """
    devices = jax.devices()
    if config.size > len(devices):
        raise ValueError(
            f"mesh.data={config.data} x mesh.model={config.model} x mesh.sweep={config.sweep} "
            f"needs {config.size} devices, {len(devices)} {devices[0].platform} device(s) are "
            "here; make the mesh smaller"
        )
    sizes = {SWEEP: config.sweep} if config.sweep > 1 else {}
    sizes |= {DATA: config.data, MODEL: config.model}
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Explicit,) * len(sizes),
        devices=devices[: config.size],
    )


def member_axis(mesh: Any) -> tuple[str, ...]:
    """What a stacked array's spec begins with: the mesh axis of members, where there is one."""
    return (SWEEP,) if SWEEP in mesh.axis_names else ()


def spec(axes: tuple[str | None, ...], rules: Mapping[str, str] | None = None) -> jax.P:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      ValueError: two logical axes on one mesh axis.
    """
    rules = COMPUTE if rules is None else rules
    names = [rules.get(a) if a is not None else None for a in axes]
    used = [name for name in names if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"axes {axes} would lie twice on one mesh axis: {names}")
    return jax.P(*names)


def shardings(specs: Any, mesh: Any, strategy: str = "tp") -> Any:
    """The NamedSharding of every ArraySpec of a tree, in storage layout."""

    def lay(s):
        return NamedSharding(mesh, spec(s.axes, STORE[strategy]))

    return jax.tree.map(lay, specs, is_leaf=_is_spec)


def abstract(specs: Any, mesh: Any = None, strategy: str = "tp") -> Any:
    """The ShapeDtypeStruct of every ArraySpec of a tree, sharded for storage if a mesh is given."""
    if mesh is None:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=_is_spec
        )
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        specs,
        shardings(specs, mesh, strategy),
        is_leaf=_is_spec,
    )


def check_divisible(specs: Any, mesh: MeshConfig) -> None:
    """Refuse, before any device is touched, arrays that the mesh cannot split evenly.

    Raises:
      ValueError: names the array, its axis and the mend.
    """
    sizes = {DATA: mesh.data, MODEL: mesh.model}
    for path, s in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        for length, axis in zip(s.shape, spec(s.axes, STORE[mesh.strategy])):
            if axis is not None and length % sizes[axis]:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has an axis of {length} that mesh.{axis}="
                    f"{sizes[axis]} does not divide; use a multiple of {sizes[axis]}"
                )


def bytes_per_device(specs: Any, mesh: MeshConfig) -> int:
    """Bytes that one device holds of a tree of ArraySpecs in storage layout."""
    sizes = {DATA: mesh.data, MODEL: mesh.model}
    total = 0
    for s in jax.tree.leaves(specs, is_leaf=_is_spec):
        parts = math.prod(sizes[a] for a in spec(s.axes, STORE[mesh.strategy]) if a)
        total += math.prod(s.shape) * np.dtype(s.dtype).itemsize // parts
    return total


def _is_spec(x: Any) -> bool:
    return hasattr(x, "axes") and hasattr(x, "shape")
