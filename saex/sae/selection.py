"""Selection without a fixed number a row: over a whole batch, or above thresholds.

Both take candidates first, the ``capacity`` largest of each row, and do rows that had more to give
densely, as ``saex.sae.exact`` says. Where candidates are a large share of the latents the dense way
is the faster one for all rows from the start: ``candidates``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.encode_topk import chosen_scores, pre_activations
from saex.kernels.topk import top_k
from saex.sae import affine, exact, ops
from saex.sae.base import DenseCodes, LossCodes, SparseCodes
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


def check_capacity(capacity: int | None, k: int = 1) -> None:
    """Raises ValueError for fewer candidates than the mean row needs."""
    if capacity and capacity < k:
        raise ValueError(f"capacity={capacity}: at least {k}, 0 (densely) or None")


def check_rate(threshold_rate: float) -> None:
    """Raises ValueError for a weight that makes no running mean."""
    if not 0 < threshold_rate <= 1:
        raise ValueError(f"threshold_rate={threshold_rate}: above 0, at most 1")


def batch_cut(total: Any, *values: Float[Array, "_ _"]) -> Float[Array, ""]:
    """The ``total``-th largest of all devices' values, at least 0: what a batch's top k begins at.

    Args:
      values: in one or several arrays, 0 where there is none; negative ones count as 0.
      total: how many of the global batch shall be kept (rows times k), traced or not. Values equal
        at the cut are all kept, so there may be more; fewer where fewer are above 0.

    By bisection on the bits: counts alone travel between devices.
    """
    held = [jax.nn.relu(v) for v in jax.lax.stop_gradient(values)]
    bits = [jax.lax.bitcast_convert_type(v, jnp.int32) for v in held]

    def halve(_, bounds):
        low, high = bounds  # at least `total` values are >= low, fewer are >= high
        middle = low + (high - low) // 2
        here = sum(jnp.sum(part >= middle, dtype=jnp.int32) for part in bits)
        count = ops.rows_sum(ops.latents_sum(here))
        enough = count >= total
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    zero = ops.zero_as_sum(bits[0])
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + infinity))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def top_of_batch(
    values: Float[Array, "b c"], n_local: int, total: Any
) -> tuple[Float[Array, "b c"], Float[Array, ""], Bool[Array, " b"]]:
    """The values of a batch's top ``total``, 0 elsewhere (BatchTopK, Bussmann et al. 2024).

    Args:
      values: this device's candidates, largest first in each row.
      n_local: latents that they were chosen from.
      total: as ``batch_cut``.

    Returns:
      (values, cut, wide): wide [b] tells rows whose last candidate was kept too, so that they may
      have had more.
    """
    cut = batch_cut(total, values)
    kept = (values >= cut) & (values > 0)
    wide = kept[:, -1] if values.shape[1] < n_local else jnp.zeros_like(kept[:, -1])
    return jnp.where(kept, values, 0), cut, wide


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
    stats: Params,
    x: Float[Array, "b d"],
    total: Any,
    capacity: int,
    objective: Callable,
    matmul_dtype: str = "float32",
    encoder: Callable = affine.encoder,
    crowded: Callable | None = None,
) -> tuple:
    """``objective(params, codes, cut)`` of the codes that are among a batch's ``total`` largest.

    Args:
      params: of the method. stats: with ``exact.STATS``. x: rows in scaled units, a constant.
      total: as ``batch_cut``.
      capacity: candidates a row, which is exact in any case (``exact``); 0: all densely.
      objective: gives (scalar, (metrics, stats, and whatever else)), the same types for all kinds
        of codes.
      matmul_dtype: dtype of the matmul's inputs.
      encoder: params -> (b_pre [d], W_enc [n, d], b_enc [n]).
      crowded: sparse codes -> [b], rows for which the objective has no room in that form; None:
        there are none.

    Returns:
      (scalar, metrics, stats, whatever else), as ``exact.counted``; gradients as
      ``exact.exactly``.
    """

    def scores(params, x):
        b_pre, W_enc, b_enc = encoder(params)
        return jax.nn.relu(pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype))

    def dense(params):
        p = scores(params, x)
        cut = batch_cut(total, p)
        return objective(params, DenseCodes(jnp.where(p >= cut, p, 0)), cut)

    if not capacity:
        loss, aux = dense(params)
        return loss, *exact.counted(aux, exact.SPARSE)
    n = stats["since_fired"].shape[0]
    weights = (x, *encoder(jax.lax.stop_gradient(params)))
    found, indices, tried = exact.candidates(stats, weights, min(capacity, n), matmul_dtype)
    found = jax.nn.relu(found)
    values, first, wide = top_of_batch(found, n, total)
    codes = affine.used_slots(values, indices)
    wide = wide if crowded is None else wide | crowded(codes)

    def sparse(params):
        return objective(params, codes, first)

    def mixed(params):
        at = exact.wide_rows(wide)
        p = scores(params, exact.of_rows(x, at[0]))
        p = jnp.where(at[0][:, None] < x.shape[0], p, 0)
        others = jnp.where(wide[:, None], 0, found)
        # what wide rows had beyond their candidates can only have raised the cut
        cut = batch_cut(total, others, p)
        narrow = affine.used_slots(jnp.where(others >= cut, others, 0), indices)
        return objective(params, exact.mixed(narrow, jnp.where(p >= cut, p, 0), *at), cut)

    way = exact.way(wide, tried)
    loss, aux = exact.exactly(way, sparse, mixed, dense, params)
    return loss, *exact.counted(aux, way, wide)


def first_cut(params: Params, x: Float[Array, "b d"], k: int) -> Float[Array, ""]:
    """``batch_cut`` of k a row on up to 512 rows (scaled units) of a sample, at initialisation."""
    few = x[:512]
    p = (few - params["b_dec"][None]) @ params["W_enc"].T
    return batch_cut(k * few.shape[0], p)


def follow(mean: Any, value: Any, rate: Any) -> Any:
    """A running mean moved by one value; where that is not finite it says nothing."""
    return jnp.where(jnp.isfinite(value), mean + rate * (value - mean), mean)


def smallest(codes: LossCodes) -> Float[Array, ""]:
    """The smallest of all devices' values that are above 0; infinity where none is."""
    held = [piece.values for piece in jax.lax.stop_gradient(codes).pieces]
    lowest = jnp.stack([jnp.min(jnp.where(v > 0, v, jnp.inf)) for v in held]).min()
    return -ops.latents_max(ops.rows_max(-lowest))


USUAL, PAY_FROM = 256, 32  # candidates where L0 is not known, and latents to each of them
NEVER = -1e30  # a pre-activation that opens no latent; finite, for gradients of 0 times it


def of_rows(
    params: Params,
    stats: Params,
    x: Float[Array, "b d"],
    threshold: Float[Array, " n"] | float,
    capacity: int | None,
    objective: Callable,
    matmul_dtype: str = "float32",
    encoder: Callable = affine.encoder,
    margin: float = 0.0,
) -> tuple:
    """``objective(params, p)`` of the pre-activations that are above their latents' thresholds.

    Args:
      params to x, matmul_dtype, encoder: as ``of_batch``.
      threshold: a constant; one a latent or one for all.
      capacity: candidates a row; 0: all densely; None: ``USUAL``, where they pay.
      objective: as ``of_batch``; its p are codes of pre-activations, with the encoder's gradient:
        all above the threshold are there, and others with them; what has no slot stands for no
        latent.
      margin: p has to hold latents that are up to this much below, too (half the bandwidth of a
        straight-through estimator).

    Returns:
      As ``of_batch``.
    """

    def scores(params, x):
        b_pre, W_enc, b_enc = encoder(params)
        return pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype)

    def dense(params):
        return objective(params, DenseCodes(scores(params, x)))

    n = stats["since_fired"].shape[0]
    size = candidates(capacity, USUAL, n, PAY_FROM)
    if not size:
        loss, aux = dense(params)
        return loss, *exact.counted(aux, exact.SPARSE)
    b_pre, W_enc, b_enc = encoder(jax.lax.stop_gradient(params))
    least = ops.own(jnp.broadcast_to(jax.lax.stop_gradient(threshold), b_enc.shape))
    weights = (x, b_pre, W_enc, b_enc - least)
    over, indices, tried = exact.candidates(stats, weights, size, matmul_dtype)
    last = over[:, -1]
    wide = ~(last <= -margin) if size < n else jnp.zeros_like(last, bool)
    found = over + least[indices]

    def chosen(params, p):
        weights = ops.own((x, *encoder(params)))
        return SparseCodes(chosen_scores(*weights, p, indices), indices)

    def sparse(params):
        return objective(params, chosen(params, found))

    def mixed(params):
        at = exact.wide_rows(wide)
        p = scores(params, exact.of_rows(x, at[0]))
        p = jnp.where(at[0][:, None] < x.shape[0], p, NEVER)
        narrow = chosen(params, jnp.where(wide[:, None], NEVER, found))
        return objective(params, exact.mixed(narrow, p, *at))

    way = exact.way(wide, tried)
    loss, aux = exact.exactly(way, sparse, mixed, dense, params)
    return loss, *exact.counted(aux, way, wide)
