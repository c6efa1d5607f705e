"""Ops on one device's arrays: each folder holds a contract, its definition and its backends.

``reference.py`` is the definition, in plain jnp; every other backend equals it in values and
gradients. ``impl=None`` picks the backend for the target and always works; a name means that
backend or an error. Collectives are not here: see ``saex/sae/ops.py``.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def target() -> str:
    """The platform that is being compiled for: "cpu", "gpu" or "tpu".

    A mesh in context knows it, also when compiling for a machine that is not here; the default
    backend is asked only where no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform if device is not None else jax.default_backend()


def pick(impls: Mapping[str, Callable], impl: str | None) -> Callable:
    """The backend named ``impl``, or the one for the target (else the reference).

    Raises:
      ValueError: there is no backend of that name.
    """
    if impl is None:
        return impls.get(target(), impls["reference"])
    if impl not in impls:
        raise ValueError(f"impl={impl!r}: choose from {sorted(impls)} or None")
    return impls[impl]


def late(module: str, name: str) -> Callable:
    """The backend ``module.name``, imported when it is first called: it may need Pallas."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def zeros_as(shape: tuple[int, ...], like: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros, of ``like``'s dtype unless told, that vary over the same mesh axes as it does.

    A loop's carry has to.
    """
    zeros = jnp.zeros(shape, like.dtype if dtype is None else dtype)
    axes = tuple(varying_axes(like))
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which a value differs from device to device, inside a shard_map."""
    return jax.typeof(x).manual_axis_type.varying


def like(x: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """What a kernel puts out, varying over the same mesh axes as its operand."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
