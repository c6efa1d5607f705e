"""A dictionary's per-device code over the mesh: the only file with shard_map and collectives.

A method's ``encode``, ``decode`` and ``loss`` are functions of one device's part: its rows of the
batch, its slice of the latents. The decorators here map them over the mesh in context. Rows are
split over one mesh axis and latents over another; the functions below are how parts meet. Without
a mesh they are the identity, and the same code runs on plain arrays.

Inside, the codes of a device name its own latents, 0..n/shards-1; outside they are global.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from saex.kernels import varying_axes
from saex.kernels.encode_topk import encode_topk
from saex.kernels.topk import top_k
from saex.sae.base import Codes, DenseCodes, Out, SparseCodes
from saex.sharding import COMPUTE, DATA, MODEL, SWEEP, spec

MEMBERS = "s"  # the logical axis of a stack

# ---------------------------------------------------------------- one device's part and the others'


def rows_sum(x: Any) -> Any:
    """The sum over the devices that hold other rows."""
    return _reduce(jax.lax.psum, x, DATA)


def latents_sum(x: Any) -> Any:
    """The sum over the devices that hold other latents."""
    return _reduce(jax.lax.psum, x, MODEL)


def latents_max(x: Any) -> Any:
    """The maximum over the devices that hold other latents; it has no gradient."""
    return _reduce(jax.lax.pmax, x, MODEL)


def rows_max(x: Any) -> Any:
    """The maximum over the devices that hold other rows; it has no gradient."""
    return _reduce(jax.lax.pmax, x, DATA)


def zero_as_sum(x: Any) -> Any:
    """An int32 0 that varies over the mesh as a sum of x over rows and latents does.

    A loop whose carry becomes such a sum has to start from one: in a stack it is a member's own.
    """
    axes = tuple(a for a in varying_axes(x) if a not in (DATA, MODEL))
    zero = jnp.int32(0)
    return jax.lax.pcast(zero, axes, to="varying") if axes else zero


def latents_gather(x: Float[Array, "b c"]) -> Float[Array, "b m"]:
    """Every device's columns side by side, in the order of their latents."""
    return jax.lax.all_gather(x, MODEL, axis=1, tiled=True) if _size(MODEL) > 1 else x


def rows_mean(x: Float[Array, " b"]) -> Float[Array, ""]:
    """The mean over all rows of the global batch."""
    return rows_sum(jnp.sum(x)) / (x.shape[0] * _size(DATA))


def rows_count(x: Any) -> int:
    """How many rows the global batch has, from this device's part of it."""
    return x.shape[0] * _size(DATA)


def latents_count(x: Any) -> int:
    """How many latents all devices hold, from this device's part of an array of them."""
    return x.shape[0] * _size(MODEL)


def latents_offset(n_local: int) -> Any:
    """The global number of this device's latent 0."""
    return jax.lax.axis_index(MODEL) * n_local if _bound(MODEL) else 0


def rows_offset(b_local: int) -> Any:
    """The global number of this device's row 0."""
    return jax.lax.axis_index(DATA) * b_local if _bound(DATA) else 0


def select_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    active_k: Any,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b c"], Int[Array, "b c"]]:
    """This device's part of each row's top k among all devices' latents.

    Args:
      x: rows in scaled units; b_pre is taken from them.
      b_pre, W_enc, b_enc: this device's encoder.
      k: bound on active_k, static. active_k: how many survive; a traced scalar or an int.
      matmul_dtype: dtype of the matmul's inputs.

    Returns:
      (values, indices): pre-activations of the survivors, 0 elsewhere. Exact, gradients too.
    """
    k_local = min(k, W_enc.shape[0])
    chosen: tuple = encode_topk(*own((x, b_pre, W_enc, b_enc)), k_local, matmul_dtype)
    values, indices = keep_largest(chosen[0], k, active_k), chosen[1]
    room = ((0, 0), (0, k - k_local))  # a shard of fewer than k latents still hands on k slots
    return jnp.pad(values, room), jnp.pad(indices, room)


def keep_largest(values: Float[Array, "b c"], k: int, active_k: Any) -> Float[Array, "b c"]:
    """Zero those of this device's candidates that are not among the row's ``active_k`` largest.

    Args:
      values: this device's candidates, largest first; a row's global top k is among all devices'.
      k: bound on active_k, static.
      active_k: how many survive: an int, a traced scalar, or one number a row, [b, 1].

    Exact, ties at the cut going to the lowest latent; only values travel between devices.
    """
    c = values.shape[1]
    if _size(MODEL) == 1:
        return jnp.where(jnp.arange(c)[None] < active_k, values, 0)
    everyone = jax.lax.all_gather(jax.lax.stop_gradient(values), MODEL, axis=1, tiled=True)
    _, slots = top_k(everyone, min(k, everyone.shape[1]))
    won = jnp.where(jnp.arange(slots.shape[1])[None] < active_k, slots, everyone.shape[1])
    rows = jnp.arange(values.shape[0])[:, None]
    table = jnp.zeros((values.shape[0], everyone.shape[1] + 1), bool).at[rows, won].set(True)
    mask = jax.lax.dynamic_slice_in_dim(table, jax.lax.axis_index(MODEL) * c, c, axis=1)
    return jnp.where(mask, values, 0)


# ------------------------------------------------------------------------------ methods to the mesh


def encode(method: Callable) -> Callable:
    """Map ``encode(self, params, x) -> codes`` over the mesh; codes come out whole and global."""

    def public(self, params, x):
        def part(params, x):
            return _globalise(method(self, params, x), self.n, getattr(self, "k", self.n))

        out = jax.tree.unflatten(_structure(self.codes), list(self.codes.AXES))
        return _over_mesh(part, (params, x), (_axes(self, params), ("b",)), out, rows=x)

    return _mapped(method, public)


def decode(method: Callable) -> Callable:
    """Map ``decode(self, params, codes, context=None) -> rows`` over the mesh."""

    def public(self, params, codes, context=None):
        def part(params, codes, context):
            return method(self, params, _localise(codes, self.n), context)

        codes_axes = jax.tree.unflatten(_structure(type(codes)), list(codes.AXES))
        axes = (_axes(self, params), codes_axes, ("b",))
        return _over_mesh(part, (params, codes, context), axes, ("b", None), rows=codes)

    return _mapped(method, public)


def loss(method: Callable) -> Callable:
    """Map ``loss(self, params, stats, batch, key, step, hyper) -> (scalar, Out)`` over the mesh.

    Arrays of a stack (all but the batch) have a leading axis of members, one for each place on the
    mesh's sweep axis; so have then the loss and all in Out.
    """

    def public(self, params, stats, batch, key, step, hyper):
        specs = self.specs()
        stats_axes = {k: s.axes for k, s in specs["stats"].items()}
        frozen = {k: s.axes for k, s in specs["params"].items() if k in self.frozen}
        out = ((), Out((), stats_axes, ("b", None), frozen))
        axes = (_axes(self, params), stats_axes, ("b",), (), (), ())
        args, fn = (params, stats, batch, key, step, hyper), functools.partial(method, self)
        if not _stacked(specs["params"], params):
            return _over_mesh(fn, args, axes, out, rows=batch)
        axes, out = _with_members(axes), _with_members(out)
        axes = (*axes[:2], ("b",), *axes[3:])  # one batch for all members
        return _over_mesh(functools.partial(_one_member, fn), args, axes, out, rows=batch)

    return _mapped(method, public)


def _stacked(specs: Any, params: Any) -> bool:
    name = next(iter(params))
    return jnp.ndim(params[name]) > len(specs[name].shape)


def _with_members(axes: Any) -> Any:
    return jax.tree.map(lambda a: (MEMBERS, *a), axes, is_leaf=_is_axes)


def _one_member(fn: Callable, params, stats, batch, key, step, hyper) -> Any:
    """A device's own member of a stack: the axis of members is 1 long here."""
    params, stats, key, step, hyper = jax.tree.map(
        lambda a: a[0], (params, stats, key, step, hyper)
    )
    return jax.tree.map(lambda a: a[None], fn(params, stats, batch, key, step, hyper))


def _mapped(method: Callable, public: Callable) -> Callable:
    """Compiled and mapped from outside; where one mapped method calls another, plain."""
    compiled = jax.jit(public, static_argnums=0)

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if jax.sharding.get_abstract_mesh().manual_axes:
            return method(self, *args, **kwargs)
        with _mesh_of((args, kwargs)):
            args, kwargs = _onto_mesh((args, kwargs))
            return compiled(self, *args, **kwargs)

    return call


def _mesh_of(args: Any) -> Any:
    """Enters the mesh that the arguments lie on, where none is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        for leaf in jax.tree.leaves(args):
            sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
                return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def _onto_mesh(args: Any) -> Any:
    """Arrays that are tied to one device, copied to all devices of the mesh in context."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):
        return args  # inside a jit, whose caller has placed them
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return args
    everywhere = NamedSharding(mesh, jax.P())

    def move(leaf):
        tied = isinstance(getattr(leaf, "sharding", None), jax.sharding.SingleDeviceSharding)
        return jax.device_put(leaf, everywhere) if tied else leaf

    return jax.tree.map(move, args)


def _over_mesh(fn: Callable, args: tuple, in_axes: tuple, out_axes: Any, rows: Any) -> Any:
    """``fn`` on each device's part of ``args``; on plain arrays where no mesh is in context.

    On a mesh of other axes than saex's own, rows stay split as they come, and latents whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*args)
    rules = {**COMPUTE, MEMBERS: SWEEP}
    if not {DATA, MODEL} <= set(mesh.axis_names):
        split = tuple(jax.typeof(jax.tree.leaves(rows)[0]).sharding.spec)
        rules = {"b": split[0]} if split and split[0] is not None else {}
    to_spec = functools.partial(spec, rules=rules)
    in_specs = jax.tree.map(to_spec, in_axes, is_leaf=_is_axes)
    out_specs = jax.tree.map(to_spec, out_axes, is_leaf=_is_axes)
    args = tuple(_reshard(a, s) for a, s in zip(args, in_specs))
    return jax.shard_map(lambda *a: fn(*a), in_specs=in_specs, out_specs=out_specs)(*args)


def on_rows(fn: Callable, matrices: tuple, scalars: tuple) -> Any:
    """``fn(matrices, scalars) -> (matrices, sums)`` on each device's rows of matrices [n, d] that
    lie alike, ``rows_whole``; sums are scalars, and come out over all rows.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return fn(matrices, scalars)
    where = jax.typeof(matrices[0]).sharding.spec
    split = where[0] if where else None

    def part(matrices, scalars):
        new, sums = fn(matrices, scalars)
        return new, jax.lax.psum(sums, split) if split else sums

    in_specs, out_specs = (where, jax.P()), (where, jax.P())
    return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs)(matrices, scalars)


def rows_whole(matrix: Any) -> bool:
    """Whether rows of the matrix are split over no mesh axis (one of 1 device counts too)."""
    return not any(jax.typeof(matrix).sharding.spec[1:])


def _globalise(codes: Codes, n: int, k: int) -> Codes:
    if isinstance(codes, DenseCodes) or not _bound(MODEL):
        return codes
    values, indices = codes.values, codes.indices
    n_local = n // _size(MODEL)
    indices = jnp.where(values != 0, indices + latents_offset(n_local), 0)
    # as many slots as here; where a device has no more latents than slots, a row may have more
    slots = values.shape[1]
    k = slots if slots != n_local else min(k, slots * _size(MODEL))
    values = jax.lax.all_gather(values, MODEL, axis=1, tiled=True, to="invarying")
    indices = jax.lax.all_gather(indices, MODEL, axis=1, tiled=True, to="invarying")
    _, best = top_k(jnp.abs(jax.lax.stop_gradient(values)), k)
    return SparseCodes(
        jnp.take_along_axis(values, best, axis=1), jnp.take_along_axis(indices, best, axis=1)
    )


def _localise(codes: Codes, n: int) -> Codes:
    if isinstance(codes, DenseCodes) or not _bound(MODEL):
        return codes
    n_local = n // _size(MODEL)
    indices = codes.indices - latents_offset(n_local)
    mine = (indices >= 0) & (indices < n_local)
    return SparseCodes(jnp.where(mine, codes.values, 0), jnp.where(mine, indices, 0))


def _axes(sae: Any, params: Any) -> dict[str, tuple]:
    specs = sae.specs()["params"]
    return {name: specs[name].axes for name in params}


def _structure(codes: type) -> Any:
    return jax.tree.structure(codes(*codes.AXES), is_leaf=_is_axes)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def _bound(axis: str) -> bool:
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def _size(axis: str) -> int:
    return jax.lax.axis_size(axis) if _bound(axis) else 1


def _reduce(collective: Callable, x: Any, axis: str) -> Any:
    return collective(x, axis) if _bound(axis) else x


def own(tree: Any) -> Any:
    """Mark arrays as this device's own copies.

    An op with a hand-written gradient returns the gradient of its own part; the sum over devices
    that share an array comes from the transpose of this mark.
    """
    return jax.tree.map(_vary, tree)


def _vary(x: Any) -> Any:
    have = varying_axes(x)
    axes = tuple(a for a in jax.sharding.get_abstract_mesh().manual_axes if a not in have)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _reshard(tree: Any, specs: Any) -> Any:
    if isinstance(specs, jax.P):
        return jax.tree.map(lambda a: jax.reshard(a, specs), tree)
    return jax.tree.map(lambda a, s: jax.reshard(a, s), tree, specs)
