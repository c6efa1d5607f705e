"""All that a step reads and writes."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from saex.sae.base import split
from saex.sharding import abstract, shardings, spec
from saex.typing import Batch, Leaf

# Bytes of the largest array up to which every device makes all of the initial weights for itself,
# four times that array meanwhile, so that they are the same bit for bit on every mesh.
WHOLE = 2**30


class TrainState(flax.struct.PyTreeNode):
    """step: int32, updates done. params, stats: as the dictionary's specs say. opt_state: optax's
    state over the trainable params.
    """

    step: Leaf
    params: Leaf
    opt_state: Leaf
    stats: Leaf


def init_state(sae: Any, tx: Any, key: jax.Array, sample: Batch, mesh: Any, strategy: str) -> Any:
    """A fresh state, laid out on the mesh, with the same numbers on every mesh.

    Where the largest array has more than ``WHOLE`` bytes each device makes its own part: what is
    drawn is the same on every mesh, sums over it (norms, a threshold) are so to rounding.

    Args:
      sae: the dictionary.
      tx: optax transformation over the trainable params.
      key: seeds the weights.
      sample: raw rows {column: [m, ...]} for means, medians and norms; replicated.
      mesh: explicit mesh in context.
      strategy: storage layout, a key of ``sharding.STORE``.
    """
    return jax.jit(initial(sae, tx, mesh, strategy))(key, sample)


def initial(sae: Any, tx: Any, mesh: Any, strategy: str) -> Callable[[jax.Array, Batch], Any]:
    """The function (key, sample) -> state that ``init_state`` compiles."""
    specs = sae.specs()
    where = shardings(specs, mesh, strategy)
    make = sae.init
    if mesh.size > 1 and _largest(specs) > WHOLE:
        # Inside, the compiler splits what is drawn and computed as its results will lie. Latents
        # over all devices, whole rows on each: else norms would be sums over devices.
        split_up = tuple(_rows_apart(specs[part], mesh) for part in ("params", "stats"))
        in_parts: Any = jax.sharding.auto_axes
        make = in_parts(make, axes=tuple(mesh.axis_names), out_sharding=split_up)

    def init(key, sample):
        params, stats = jax.tree.map(_strong, make(key, sample))
        lay = lambda tree, to: {k: jax.reshard(v, to[k].spec) for k, v in tree.items()}  # noqa: E731
        params, stats = lay(params, where["params"]), lay(stats, where["stats"])
        trainable, _ = split(params, specs["params"])
        opt_state = tx.init(trainable)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, stats)

    return init


def _strong(leaf: jax.Array) -> jax.Array:
    """Weakly typed at the start (a Python number's), an array makes the step compile once more."""
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def _largest(specs: Any) -> int:
    """Bytes of the largest array of params."""
    return max(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in specs["params"].values())


def _rows_apart(specs: Any, mesh: Any) -> Any:
    """PartitionSpecs with latents split over all devices; where they do not divide, as they lie."""
    axes: Any = tuple(mesh.axis_names)

    def lay(s):
        divides = all(n % mesh.size == 0 for n, a in zip(s.shape, s.axes) if a == "n")
        return jax.P(*(axes if a == "n" else None for a in s.axes)) if divides else spec(s.axes)

    return {name: lay(s) for name, s in specs.items()}


def abstract_state(sae: Any, tx: Any, mesh: Any = None, strategy: str = "tp") -> Any:
    """The ShapeDtypeStructs of the state, with shardings if a mesh is given."""
    specs = sae.specs()
    params = abstract(specs["params"], mesh, strategy)
    stats = abstract(specs["stats"], mesh, strategy)
    trainable, _ = split(params, specs["params"])
    # without its mesh in context, JAX 0.12 forgets where an abstract array lies
    known = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with known:
        opt_state = jax.eval_shape(tx.init, trainable)
    if mesh is not None:
        opt_state = jax.tree.map(_replicated(mesh), opt_state)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    else:
        step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, params, opt_state, stats)


def _replicated(mesh):
    def lay(leaf):
        spec = getattr(leaf.sharding, "spec", None)
        if spec is not None and any(s is not None for s in spec):
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
            )
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, jax.P())
        )

    return lay
