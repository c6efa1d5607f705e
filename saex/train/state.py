"""All that a step reads and writes."""

import contextlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from saex.sae.base import split
from saex.sharding import abstract, shardings
from saex.typing import Batch, Leaf


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

    Each device computes the initial weights whole before it keeps its part, so a device must hold
    a few times the size of W_enc while this runs.

    Args:
      sae: the dictionary.
      tx: optax transformation over the trainable params.
      key: seeds the weights.
      sample: raw rows {column: [m, ...]} for means, medians and norms; replicated.
      mesh: explicit mesh in context.
      strategy: storage layout, a key of ``sharding.STORE``.
    """
    specs = sae.specs()
    where = shardings(specs, mesh, strategy)

    @jax.jit
    def init(key, sample):
        # Drawn and computed on replicated values, then laid out: the same numbers on every mesh.
        params, stats = sae.init(key, sample)
        lay = lambda tree, to: {k: jax.reshard(v, to[k].spec) for k, v in tree.items()}  # noqa: E731
        params, stats = lay(params, where["params"]), lay(stats, where["stats"])
        trainable, _ = split(params, specs["params"])
        opt_state = tx.init(trainable)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, stats)

    return init(key, sample)


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
