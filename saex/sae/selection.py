"""Selection without a fixed number a row: over a whole batch, or above thresholds.

Both look for what lies above a number that is known before, and are done densely where there is
more than there is room for, as ``saex.sae.exact`` says. Where that room is a large share of the
latents the dense way is the faster one for all batches: ``room_for``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.encode_above import room_for
from saex.kernels.encode_topk import chosen_scores, pre_activations
from saex.kernels.topk import top_k
from saex.sae import affine, exact, ops, sums
from saex.sae.base import ArraySpec, DenseCodes, LossCodes
from saex.sae.ragged import laid_out
from saex.typing import Params

# Of a batch's top k: what is above so much of the last batch's cut is looked for. On a small
# language model's rows the cuts of batches of 4096 vary by 2%, and fall by 4% a step in the first
# 20 of 300. Of a trained dictionary 6% more lies above this than above the cut; of an untrained one
# of 2048 latents 36%, of 8192 50%.
BELOW_LAST = 0.93
STATS = {**exact.STATS, "last_cut": ArraySpec((), (), doc="the last batch's; 0: none yet")}
COUNTED = 2**31 - 1  # scores


def stats(cut: Any) -> Params:
    """``STATS`` at the start. cut: of a sample."""
    return {**exact.stats(), "last_cut": cut}


def check_capacity(capacity: int | None, k: int = 1) -> None:
    """Raises ValueError for less room than the mean row needs."""
    if capacity and capacity < k:
        raise ValueError(f"capacity={capacity}: at least {k}, 0 (densely) or None")


def check_rate(threshold_rate: float) -> None:
    """Raises ValueError for a weight that makes no running mean."""
    if not 0 < threshold_rate <= 1:
        raise ValueError(f"threshold_rate={threshold_rate}: above 0, at most 1")


def batch_cut(total: Any, values: Float[Array, "_ _"]) -> Float[Array, ""]:
    """The ``total``-th largest of all devices' values, at least 0: what a batch's top k begins at.

    Args:
      values: 0 where there is none; negative ones count as 0.
      total: how many of the global batch shall be kept (rows times k), traced or not. Values equal
        at the cut are all kept, so there may be more; fewer where fewer are above 0.

    By bisection on the bits: counts alone travel between devices.
    """
    many = ops.rows_count(values) * ops.latents_count(values.T) > COUNTED
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(jax.lax.stop_gradient(values)), jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # at least `total` values are >= low, fewer are >= high
        middle = low + (high - low) // 2
        here = sums.count(bits >= middle)
        enough = ops.rows_sum(ops.latents_sum(here)) >= total
        if many:  # more than an int32 counts: these are enough in any case
            rough = jnp.sum(jnp.sum(bits >= middle, axis=1), dtype=jnp.float32)
            enough |= ops.rows_sum(ops.latents_sum(rough)) > COUNTED / 2
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    zero = ops.zero_as_sum(bits)
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + infinity))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


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
        here = sums.over_rows((bits >= cuts[None]).astype(jnp.int32))
        return ops.rows_sum(here) >= totals

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
    active_k: Any,
    k: int,
    capacity: int | None,
    objective: Callable,
    matmul_dtype: str = "float32",
    encoder: Callable = affine.encoder,
    level: Callable | None = None,
    levels: int = 1,
) -> tuple:
    """``objective(params, codes, cut)`` of a batch's largest codes, ``active_k`` a row in the mean.

    Args:
      params: of the method. stats: with ``STATS``. x: rows in scaled units, a constant.
      active_k: how many of a row, in the mean, traced or not. k: its bound, static.
      capacity: room for what may be among them, in latents of a row, in the mean; 0: all densely;
        None: 2 k, where it pays, of which 1.25 k may be kept on one device of rows. The result is
        exact in any case (``exact``).
      objective: gives (scalar, (metrics, stats, and whatever else)), the same types for all kinds
        of codes: pre-activations above 0 that were chosen, without a gradient if ragged.
      matmul_dtype: dtype of the matmul's inputs.
      encoder: params -> (b_pre [d], W_enc [n, d], b_enc [n]).
      level: this device's latents by number -> 0..levels-1, which never falls as they rise: of what
        is reconstructed apart (``nested``); None: all of one.

    Returns:
      (scalar, metrics, stats, whatever else), as ``exact.counted``; gradients as
      ``exact.exactly``.
    """
    b, total = x.shape[0], active_k * ops.rows_count(x)
    size = room_for(capacity, stats["since_fired"].shape[0], k)

    def dense(params):
        b_pre, W_enc, b_enc = encoder(params)
        p = jax.nn.relu(pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype))
        cut = batch_cut(total, p)
        return told(params, DenseCodes(jnp.where(p >= cut, p, 0)), cut)

    def told(params, codes, cut):
        loss, (metrics, after, *rest) = objective(params, codes, cut)
        return loss, (metrics, {**after, "last_cut": cut}, *rest)

    if not size:
        loss, aux = dense(params)
        return loss, *exact.counted(aux)
    least = BELOW_LAST * jax.lax.stop_gradient(stats["last_cut"])
    weights = (x, *encoder(jax.lax.stop_gradient(params)))
    above = exact.found(stats, weights, least, size, matmul_dtype)
    values = jax.nn.relu(above.values)
    cut = batch_cut(total, values)
    keep = (values >= cut) & (values > 0)
    # of one device's rows, which may have more than others'
    most = b * (min(size, k + k // 4) if capacity is None else size)
    apart = level(above.indices) if level else None
    codes, fits = laid_out(above, keep, values, b, most, 0.0, apart, levels)
    enough = exact.everywhere(above.whole & fits & ((cut > least) | (least == 0)))
    loss, aux = exact.exactly(enough, lambda params: told(params, codes, cut), dense, params)
    return loss, *exact.counted(aux, enough)


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
    values = jax.lax.stop_gradient(codes.values)
    lowest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    return -ops.latents_max(ops.rows_max(-lowest))


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
      params, x, matmul_dtype, encoder: as ``of_batch``. stats: with ``exact.STATS``.
      threshold: a constant; one a latent or one for all.
      capacity: room for latents of a row, in the mean; 0: all densely; None: as ``room_for``.
      objective: as ``of_batch``; its p are codes of pre-activations, with the encoder's gradient:
        all above the threshold are there, and maybe others; what has no slot stands for no latent.
      margin: p has to hold latents that are up to this much below, too (half the bandwidth of a
        straight-through estimator).

    Returns:
      As ``of_batch``.
    """

    def dense(params):
        b_pre, W_enc, b_enc = encoder(params)
        return objective(params, DenseCodes(pre_activations(x, b_pre, W_enc, b_enc, matmul_dtype)))

    b, size = x.shape[0], room_for(capacity, stats["since_fired"].shape[0])
    if not size:
        loss, aux = dense(params)
        return loss, *exact.counted(aux)
    weights = (x, *encoder(jax.lax.stop_gradient(params)))
    least = jax.lax.stop_gradient(threshold) - margin
    above = exact.found(stats, weights, least, size, matmul_dtype)
    used = above.values != -jnp.inf
    codes, fits = laid_out(above, used, above.values, b, b * size, NEVER)

    def sparse(params):
        b_pre, W_enc, b_enc = encoder(params)
        weights = ops.own((x, b_pre, W_enc, b_enc))
        p = chosen_scores(*weights, codes.values, codes.indices, codes.rows)
        return objective(params, codes.replace(values=p))

    enough = exact.everywhere(above.whole & fits)
    loss, aux = exact.exactly(enough, sparse, dense, params)
    return loss, *exact.counted(aux, enough)
