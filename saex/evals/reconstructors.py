"""What can stand in an activation's place: a dictionary's output, a constant, a control's."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from saex.sae import Codes, SparseCodes


@runtime_checkable
class Reconstructor(Protocol):
    """Rows in, rows out, each by itself."""

    @property
    def l0(self) -> float | None:
        """How many numbers a row is described by, where that is fixed beforehand."""
        ...

    def reconstruct(self, x: Any, tokens: Any) -> Any:
        """float32 [b, d] in place of raw rows x [b, d]; tokens int32 [b], or None."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class OfDictionary:
    """A dictionary with its params, wherever they lie."""

    sae: Any
    params: Any
    l0: None = None

    def reconstruct(self, x: Any, tokens: Any) -> Any:
        """decode(encode(x))."""
        return self.measure(x, np.zeros(x.shape[0], bool)).y

    def measure(self, x: Any, kept: np.ndarray) -> "Measured":
        """Encode and decode raw rows [b, d]; ``kept``: bool [b], the rows whose firing counts."""
        if not _on_a_mesh(self.params):
            return _measure(self.sae, self.params, x, kept)
        with on_mesh_of(self.params):
            return jax.tree.map(local, _measure(self.sae, self.params, np.asarray(x), kept))


class Measured(NamedTuple):
    """y: float32 [b, d]. l0: int32 [b], active latents. l1: float32 [b], sum of |code|.

    fired: int32 [n], kept rows in which each latent is not 0.
    """

    y: Any
    l0: Any
    l1: Any
    fired: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """The same vector [d] for every row: an ablation."""

    value: Any
    l0: float | None = 0.0

    def reconstruct(self, x: Any, tokens: Any) -> Any:
        """The vector, b times."""
        value = np.asarray(self.value, np.float32)
        return jnp.broadcast_to(value[None], (x.shape[0], value.shape[0]))


@functools.partial(jax.jit, static_argnums=0)
def _measure(sae: Any, params: Any, x: Float[Array, "b d"], kept: Bool[Array, " b"]) -> Measured:
    codes = sae.encode(params, x)
    y = sae.decode(params, codes, x).astype(jnp.float32)
    l0 = jnp.sum(codes.values != 0, axis=1, dtype=jnp.int32)
    l1 = jnp.sum(jnp.abs(codes.values), axis=1, dtype=jnp.float32)
    y, l0, l1 = everywhere((y, l0, l1))
    return Measured(y, l0, l1, fired(codes, kept, sae.n))


def fired(codes: Codes, kept: Bool[Array, " b"], n: int) -> Int[Array, " n"]:
    """Inside a jitted function: kept rows in which each latent is not 0, whole on every device."""
    if isinstance(codes, SparseCodes):
        values, indices = everywhere((codes.values, codes.indices))
        on = (values != 0) & kept[:, None]
        hits = jnp.zeros((n,), jnp.int32).at[indices.reshape(-1)]
        return hits.add(on.reshape(-1).astype(jnp.int32))
    return everywhere(jnp.sum((codes.values != 0) & kept[:, None], axis=0, dtype=jnp.int32))


# ------------------------------------------------------------------------------ params on a mesh


def on_mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """The mesh that params lie on, set for the block; nothing where one is set or there is none."""
    mesh = _mesh_of(params)
    if jax.sharding.get_abstract_mesh().empty and mesh is not None:
        return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def _mesh_of(params: Any) -> Any:
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
            return sharding.mesh
    return None


def _on_a_mesh(params: Any) -> bool:
    return not jax.sharding.get_abstract_mesh().empty or _mesh_of(params) is not None


def everywhere(tree: Any) -> Any:
    """Inside a jitted function: every array whole on every device of the mesh, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda a: jax.reshard(a, jax.P()), tree)


def local(x: jax.Array) -> np.ndarray:
    """An array that is whole on every device, on the host: what runs next may be on others."""
    return np.asarray(x.addressable_data(0))
