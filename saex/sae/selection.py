"""Selection without a fixed number a row: over a whole batch, or above thresholds.

Both take candidates first, the ``capacity`` largest of each row, and are exact where no row had
more to give; whether that was so is returned, equal on all devices. ``exactly`` then takes the
sparse way, or the dense one where it was not. Where candidates are a large share of the latents the
dense way is the faster one from the start: ``candidates``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.encode_topk import encode_topk
from saex.kernels.topk import top_k
from saex.sae import affine, ops
from saex.sae.base import ArraySpec, DenseCodes
from saex.typing import Params


def candidates(capacity: int | None, usual: int, n: int, pay_from: int = 12) -> int:
    """Candidates to take of each row's n latents on a device; 0: none, everything densely.

    Args:
      capacity: as a method was given it; None: the usual number, where it pays.
      usual: what the method takes.
      n: latents of this device.
      pay_from: latents to each candidate from which on they are the faster way (of CPUs:
        experiments/benchmarks/candidates_cpu.py).
    """
    if capacity is not None:
        return min(capacity, n)
    return usual if pay_from * usual <= n else 0


def check_capacity(capacity: int | None, least: int) -> None:
    """Raises ValueError for fewer candidates than the mean row needs."""
    if capacity and capacity < least:
        raise ValueError(f"capacity={capacity}: at least k={least}, 0 (densely) or None")


def check_rate(threshold_rate: float) -> None:
    """Raises ValueError for a weight that makes no running mean."""
    if not 0 < threshold_rate <= 1:
        raise ValueError(f"threshold_rate={threshold_rate}: above 0, at most 1")


COUNT = {"fallbacks": ArraySpec((), (), "int32", doc="steps whose candidates did not do")}


def no_fallbacks() -> Params:
    """The stats of ``COUNT`` at the start."""
    return {"fallbacks": jnp.zeros((), jnp.int32)}


def counted(stats: Params, exact: Bool[Array, ""]) -> tuple[Params, Params]:
    """(stats with this step counted if its candidates did not do, what the metrics say of it)."""
    so_far = stats["fallbacks"] + (~exact).astype(jnp.int32)
    told = {"fallback": 1 - exact.astype(jnp.float32), "fallbacks": so_far.astype(jnp.float32)}
    return {**stats, "fallbacks": so_far}, told


def batch_cut(values: Float[Array, "b c"], total: Any) -> Float[Array, ""]:
    """The ``total``-th largest of all devices' values, at least 0: what a batch's top k begins at.

    Args:
      values: candidates, 0 where there is none; negative ones count as 0.
      total: how many of the global batch shall be kept (rows times k), traced or not. Values equal
        at the cut are all kept, so there may be more; fewer where fewer are above 0.

    By bisection on the bits: counts alone travel between devices.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(jax.lax.stop_gradient(values)), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # at least `total` values are >= low, fewer are >= high
        middle = low + (high - low) // 2
        count = ops.rows_sum(ops.latents_sum(jnp.sum(bits >= middle, dtype=jnp.int32)))
        enough = count >= total
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    zero = ops.zero_as_sum(bits)
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + infinity))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def top_of_batch(
    values: Float[Array, "b c"], n_local: int, total: Any
) -> tuple[Float[Array, "b c"], Float[Array, ""], Bool[Array, ""]]:
    """The values of a batch's top ``total``, 0 elsewhere (BatchTopK, Bussmann et al. 2024).

    Args:
      values: this device's candidates, largest first in each row.
      n_local: latents that they were chosen from.
      total: as ``batch_cut``.

    Returns:
      (values, cut, exact): exact is False where a row's last candidate was kept too, so that the
      row may have had more.
    """
    cut = batch_cut(values, total)
    kept = (values >= cut) & (values > 0)
    exact = everywhere(~kept[:, -1]) if values.shape[1] < n_local else jnp.bool_(True)
    return jnp.where(kept, values, 0), cut, exact


def largest(
    scores: Float[Array, "b n"], k: int, active_k: Any
) -> tuple[Int[Array, "b k"], Bool[Array, "b k"]]:
    """(indices, kept): which of this device's latents are among each row's ``active_k`` largest.

    For methods that have all scores at hand; those with an affine encoder and no others have
    ``ops.select_topk``. Scores of 0 and below are never kept. No gradient.

    Args:
      scores: this device's. k: bound on active_k, static; a device of fewer latents still hands on
        k slots. active_k: as ``ops.keep_largest``.
    """
    values, indices = top_k(jax.lax.stop_gradient(scores), min(k, scores.shape[1]))
    kept = ops.keep_largest(values, k, active_k) > 0
    room = ((0, 0), (0, k - values.shape[1]))
    return jnp.pad(indices, room), jnp.pad(kept, room)


def norm_cut(values: Float[Array, "b c"], norm: Float[Array, " b"]) -> Float[Array, " b"]:
    """Where each row's largest values, kept from there on, come nearest to a norm (top-AFA).

    Of the prefixes of a row's sorted values (over all devices that hold latents) the one with
    | ||prefix|| - norm | least, at least one value long; of equally near ones the shorter. Values
    equal at the cut are all kept; 0 where all that are above 0 do not reach the norm.

    Args:
      values: 0 where there is none; negative ones count as 0.
      norm: one a row.
    """
    values = jax.nn.relu(jax.lax.stop_gradient(values))
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    power = jax.lax.stop_gradient(jnp.square(norm))

    def power_from(cut):
        kept = jnp.where(bits >= cut[:, None], jnp.square(values), 0)
        return ops.latents_sum(jnp.sum(kept, axis=1))

    top = ops.latents_max(jnp.max(bits, axis=1))
    low, high = _bisect(lambda cut: power_from(cut) > power, top + 1)
    less, more = (jnp.abs(jnp.sqrt(power_from(cut)) - norm) for cut in (high, low))
    cut = jnp.where((less <= more) & (high <= top), high, low)
    return jnp.where(cut > 1, jax.lax.bitcast_convert_type(cut, jnp.float32), 0)


def column_cuts(values: Float[Array, "b n"], totals: Float[Array, " n"]) -> Float[Array, " n"]:
    """The ``totals[j]``-th largest value of each latent over the global batch, at least 0.

    Infinity where a total is 0. Values equal at the cut are all kept, as in ``batch_cut``.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(jax.lax.stop_gradient(values)), jnp.int32)

    def enough(cuts):
        return ops.rows_sum(jnp.sum(bits >= cuts[None], axis=0, dtype=jnp.int32)) >= totals

    top = ops.rows_max(jnp.max(bits, axis=0))
    low, _ = _bisect(enough, top + 1)
    return jnp.where(totals > 0, jax.lax.bitcast_convert_type(low, jnp.float32), jnp.inf)


def _bisect(enough: Callable[[Any], Any], high: Int[Array, " m"]) -> tuple[Any, Any]:
    """(low, high), neighbours for each entry: ``enough`` at low (or low is 0), not at high."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        reached = enough(middle)
        # where low stays 0 and is not enough itself, it is never handed on as the upper end
        return jnp.where(reached, middle, low), jnp.where(reached | (middle == 0), high, middle)

    return jax.lax.fori_loop(0, 32, halve, (zeros_as(high.shape, high), high))


def of_batch(
    params: Params,
    rows: Float[Array, "b d"],
    total: Any,
    capacity: int,
    matmul_dtype: str,
    objective: Callable,
) -> tuple[Any, Any, Bool[Array, ""]]:
    """``objective(params, codes, cut)`` of the codes that are among a batch's ``total`` largest.

    Args:
      params: an affine encoder's. rows: raw ones.
      total: as ``batch_cut``.
      capacity: candidates a row; where one may have had more the codes are dense, with 0 always.
      matmul_dtype: dtype of the matmul's inputs.
      objective: gives (scalar, auxiliary tree), the same types for sparse and for dense codes.

    Returns:
      (scalar, auxiliary tree, whether candidates sufficed); gradients as ``exactly``.
    """

    def dense(params):
        p = jax.nn.relu(affine.scores(params, affine.scaled(params, rows), matmul_dtype))
        cut = batch_cut(p, total)
        return objective(params, DenseCodes(jnp.where(p >= cut, p, 0)), cut)

    if not capacity:
        return *dense(params), jnp.bool_(True)
    held, n = jax.lax.stop_gradient(params), params["W_enc"].shape[0]
    weights = (affine.scaled(held, rows), *(held[name] for name in ("b_dec", "W_enc", "b_enc")))
    chosen: tuple = encode_topk(*ops.own(weights), min(capacity, n), matmul_dtype)
    values, cut, exact = top_of_batch(jax.nn.relu(chosen[0]), n, total)

    def sparse(params):
        return objective(params, affine.used_slots(values, chosen[1]), cut)

    loss, aux = exactly(exact, sparse, dense, params)
    return loss, aux, exact


def first_cut(params: Params, x: Float[Array, "b d"], k: int) -> Float[Array, ""]:
    """``batch_cut`` of k a row on up to 512 rows (scaled units) of a sample, at initialisation."""
    few = x[:512]
    p = (few - params["b_dec"][None]) @ params["W_enc"].T
    return batch_cut(p, k * few.shape[0])


def follow(mean: Any, value: Any, rate: Any) -> Any:
    """A running mean moved by one value; where that is not finite it says nothing."""
    return jnp.where(jnp.isfinite(value), mean + rate * (value - mean), mean)


def smallest(values: Float[Array, "b c"]) -> Float[Array, ""]:
    """The smallest of all devices' values that are above 0; infinity where none is."""
    values = jax.lax.stop_gradient(values)
    lowest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    return -ops.latents_max(ops.rows_max(-lowest))


def above(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    threshold: Float[Array, " n"],
    capacity: int,
    margin: float = 0.0,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b c"], Int[Array, "b c"], Bool[Array, "b c"], Bool[Array, ""]]:
    """This device's latents whose pre-activation is above their own threshold (JumpReLU).

    Args:
      x, b_pre, W_enc, b_enc: as ``ops.select_topk``.
      threshold: one a latent.
      capacity: slots a row.
      margin: also hand on latents that are up to this much below (half the bandwidth of a
        straight-through estimator).
      matmul_dtype: dtype of the matmul's inputs.

    Returns:
      (p, indices, active, exact): pre-activations of the ``capacity`` latents that are most above
      their thresholds; which of them are above (p > threshold); whether no row had more of them
      within the margin. No gradient: ``kernels.encode_topk.chosen_scores`` gives p the encoder's.
    """
    held = jax.lax.stop_gradient((x, b_pre, W_enc, b_enc - threshold, threshold))
    x, b_pre, W_enc, bias, threshold = ops.own(held)
    size = min(capacity, W_enc.shape[0])
    chosen: tuple = encode_topk(x, b_pre, W_enc, bias, size, matmul_dtype)
    over, indices = chosen
    exact = everywhere(over[:, -1] <= -margin) if size < W_enc.shape[0] else jnp.bool_(True)
    return over + threshold[indices], indices, over > 0, exact


def everywhere(ok: Bool[Array, " b"]) -> Bool[Array, ""]:
    """Whether it holds in all rows on all devices."""
    return ops.rows_sum(ops.latents_sum(jnp.sum(~ok, dtype=jnp.int32))) == 0


def exactly(exact: Bool[Array, ""], sparse: Callable, dense: Callable, weights: Any) -> Any:
    """``sparse(weights)`` where that is exact, else ``dense(weights)``, with that one's gradients.

    Value and gradients are made inside one branch, so that the other one's arrays ([b, n] of the
    dense way) exist only where it is taken. Both return (scalar, auxiliary tree) of equal types.

    Args:
      exact: equal on all devices.
      sparse, dense: functions of ``weights`` alone (close over the rest).
      weights: a tree of arrays.

    Returns:
      (scalar, auxiliary tree); gradients reach ``weights`` through the scalar alone.
    """
    held = jax.lax.stop_gradient(weights)
    both = [jax.value_and_grad(f, has_aux=True) for f in (sparse, dense)]
    (value, aux), grads = jax.lax.cond(exact, *both, held)
    return _with_gradient(value, grads, weights), jax.lax.stop_gradient(aux)


@jax.custom_vjp
def _with_gradient(value: Any, grads: Any, weights: Any) -> Any:
    """``value``, whose gradient in ``weights`` is ``grads``."""
    return value


def _forward(value, grads, weights):
    return value, grads


def _backward(grads, cotangent):
    return None, None, jax.tree.map(lambda g: g * cotangent, grads)


_with_gradient.defvjp(_forward, _backward)
