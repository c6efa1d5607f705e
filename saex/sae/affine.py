"""The affine encoder and decoder that most methods share, as functions of plain arrays.

Weights see rows in *scaled* units, x * scale: ``scale`` is a constant in params, estimated at
initialisation. ``encode`` takes and ``decode`` returns raw units, so a checkpoint is complete.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import zeros_as
from saex.kernels.adam.reference import unit_rows
from saex.kernels.encode_topk import pre_activations
from saex.kernels.sparse_affine import sparse_affine, sparse_affine_aux
from saex.kernels.sparse_affine.dead import cut as dead_cut
from saex.kernels.sparse_affine.dead import largest, listed
from saex.kernels.topk import top_k
from saex.sae import losses, ops, sums
from saex.sae.base import ArraySpec, DenseCodes, LossCodes, RaggedCodes, SparseCodes
from saex.typing import Params

Normalize = Literal["none", "unit_mean_square"]
BiasInit = Literal["geometric_median", "mean", "zeros"]


def specs(d_in: int, d_out: int, n: int) -> dict[str, ArraySpec]:
    """W_enc [n, d_in], W_dec [n, d_out], b_enc [n], b_dec [d_out], scale []."""
    return {
        "W_enc": ArraySpec((n, d_in), ("n", "d"), doc="encoder, one row per latent"),
        "W_dec": ArraySpec((n, d_out), ("n", "d"), doc="decoder, one row per latent"),
        "b_enc": ArraySpec((n,), ("n",), doc="encoder bias"),
        "b_dec": ArraySpec((d_out,), ("d",), doc="decoder bias"),
        "scale": ArraySpec((), (), trainable=False, doc="weights see x * scale"),
    }


# ----------------------------------------------------------------------------------- initial values


def init_tied(
    key: jax.Array, x: Float[Array, "b d"], n: int, normalize: Normalize, b_dec_init: BiasInit
) -> tuple[Params, Float[Array, "b d"]]:
    """(params, rows in scaled units): W_enc random, W_dec its unit rows, b_dec the rows' centre.

    Args:
      key: of the weights.
      x: a sample of raw rows. n: latents. normalize, b_dec_init: ``scale_of``, ``centre``.
    """
    scale = scale_of(x, normalize)
    x = x.astype(jnp.float32) * scale
    W_enc = tied_init(key, x.shape[1], n)
    params = {
        "W_enc": W_enc,
        "W_dec": unit_rows(W_enc),
        "b_enc": jnp.zeros((n,)),
        "b_dec": centre(x, b_dec_init),
        "scale": scale,
    }
    return params, x


def match_norms(key: jax.Array, params: Params, k: int) -> Params:
    """W_enc scaled so that ||x_hat|| is ||x||, by 256 random unit rows through TopK(k)."""
    d = params["W_enc"].shape[1]
    probes = unit_rows(jax.random.normal(key, (256, d)))
    values, indices = jax.lax.top_k(probes @ params["W_enc"].T, k)
    y = jnp.einsum("bk,bkd->bd", jax.nn.relu(values), params["W_dec"][indices])
    return {**params, "W_enc": params["W_enc"] / jnp.mean(jnp.linalg.norm(y, axis=1))}


def mse_scale(x: Float[Array, "b d"]) -> Float[Array, ""]:
    """1 / variance of the rows, per dimension: with it, predicting the mean scores 1."""
    var = jnp.mean(jnp.square(x - jnp.mean(x, axis=0, keepdims=True)))
    return 1 / jnp.maximum(var, 1e-30)


def stats_specs(n: int) -> dict[str, ArraySpec]:
    """What most methods count in training: since_fired [n], and the loss scale mse_scale []."""
    return {
        "since_fired": ArraySpec((n,), ("n",), "int32", doc="rows since it last fired"),
        "mse_scale": ArraySpec((), (), doc="1 / variance of the sample, per dimension"),
    }


def stats(n: int, x: Float[Array, "b d"]) -> Params:
    """``stats_specs`` at the start: nothing has fired late, and the scale of a sample's rows."""
    return {"since_fired": jnp.zeros((n,), jnp.int32), "mse_scale": mse_scale(x)}


def scaled(params: Params, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Raw rows of any float dtype in the units that the weights see, float32."""
    return x.astype(jnp.float32) * params["scale"]


def scores(
    params: Params, x: Float[Array, "b d"], matmul_dtype: str = "float32"
) -> Float[Array, "b n"]:
    """(x - b_dec) W_enc^T + b_enc of rows in scaled units: this device's part of the latents."""
    return pre_activations(x, params["b_dec"], params["W_enc"], params["b_enc"], matmul_dtype)


def encoder(params: Params) -> tuple[Any, Any, Any]:
    """(b_pre, W_enc, b_enc): what most methods encode by."""
    return params["b_dec"], params["W_enc"], params["b_enc"]


def decode(params: Params, codes, matmul_dtype: str = "float32") -> Float[Array, "b d"]:
    """codes W_dec + b_dec, in scaled units, from one device's part of the latents."""
    return sums.decode_part(codes, params["W_dec"], matmul_dtype) + params["b_dec"][None]


def decode_aux(
    params: Any,
    x: Float[Array, "b d"],
    codes: LossCodes,
    dead: Bool[Array, " n"],
    coefficient: float,
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[Any, Float[Array, "b o"], Float[Array, ""], Float[Array, ""]]:
    """(codes, reconstruction with b_dec, AuxK, latents that AuxK served).

    Args:
      params, x, dead, k_aux, matmul_dtype: as ``decode_chosen_aux``.
      codes: sparse or ragged ones as ``decode_chosen`` takes them; dense ones with a gradient of
        their own.
      coefficient: 0 leaves AuxK out.
    """
    codes, y, y_dead, served = decode_both(params, x, codes, dead, coefficient, k_aux, matmul_dtype)
    y = y + params["b_dec"][None]
    aux = losses.aux_k(x - y, y_dead, dead) if coefficient else jnp.zeros(())
    return codes, y, aux, served


def decode_both(
    params: Any,
    x: Float[Array, "b d"],
    codes: LossCodes,
    dead: Bool[Array, " n"],
    coefficient: float,
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[Any, Float[Array, "b o"], Any, Float[Array, ""]]:
    """(codes, y, y_dead, served) as ``decode_chosen_aux``, of any codes.

    For methods whose decoder bias is not what the encoder takes from x (``params["b_dec"]`` is the
    latter), or whose residual is that of another column: ``losses.aux_k`` makes AuxK of y_dead.

    Args:
      params, x, codes, dead, coefficient, k_aux, matmul_dtype: as ``decode_aux``; with a
        coefficient of 0 y_dead is None.
    """
    if not coefficient:
        if isinstance(codes, DenseCodes):
            y = sums.decode_part(codes, params["W_dec"], matmul_dtype)
        else:
            codes, y = decode_chosen(params, x, codes)
        return codes, y, None, jnp.zeros(())
    aux = dead, k_aux, matmul_dtype
    if not isinstance(codes, DenseCodes):
        return decode_chosen_aux(params, x, codes, *aux)
    _, _, y_dead, served = decode_chosen_aux(params, x, _nothing(x), *aux)
    return codes, sums.decode_part(codes, params["W_dec"], matmul_dtype), y_dead, served


def aux_alone(
    params: Any,
    x: Float[Array, "b d"],
    residual: Float[Array, "b o"],
    dead: Bool[Array, " n"],
    coefficient: float,
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(AuxK, latents that it served), for methods that make the reconstruction themselves.

    Args: as ``decode_aux``; residual: x minus the reconstruction.
    """
    if not coefficient:
        return jnp.zeros(()), jnp.zeros(())
    _, _, y_dead, served = decode_chosen_aux(params, x, _nothing(x), dead, k_aux, matmul_dtype)
    return losses.aux_k(residual, y_dead, dead), served


def _nothing(x: Float[Array, "b d"]) -> SparseCodes:
    """Codes of one slot that is not used; no constant, or XLA makes one of all that follows."""
    values, indices = jnp.zeros((x.shape[0], 1)), jnp.zeros((x.shape[0], 1), jnp.int32)
    return SparseCodes(*ops.own(jax.lax.optimization_barrier((values, indices))))


def decode_chosen(
    params: Any, x: Float[Array, "b d"], codes: SparseCodes | RaggedCodes
) -> tuple[Any, Float[Array, "m o"]]:
    """(codes, reconstruction without bias), as functions of the affine encoder and decoder.

    Args:
      params: W_enc, b_enc, W_dec, b_dec (taken from x before the encoder): this device's latents.
      x: rows in scaled units.
      codes: pre-activations where a latent was chosen, 0 elsewhere; no gradient of their own.

    Returns:
      The codes with the gradient that leads to the encoder, and the sum over all devices' latents;
      of ragged codes with levels that of each, [b * levels, o].
    """
    ragged = isinstance(codes, RaggedCodes)
    lines = (ops.own(codes.groups), codes.levels) if ragged else (None, 1)
    out: tuple = sparse_affine(*_own(params, x, codes), None, *lines)
    return codes.replace(values=out[0]), ops.latents_sum(out[1])


def _own(params, x, codes):
    """What the op takes of an affine dictionary and of codes, as this device's own copies."""
    weights = (x, *(params[name] for name in ("b_dec", "W_enc", "b_enc", "W_dec")))
    return ops.own((*weights, *jax.lax.stop_gradient((codes.values, codes.indices))))


def decode_chosen_aux(
    params: Any,
    x: Float[Array, "b d"],
    codes: SparseCodes | RaggedCodes,
    dead: Bool[Array, " n"],
    k_aux: int,
    matmul_dtype: str = "float32",
) -> tuple[Any, Float[Array, "b o"], Float[Array, "b o"], Float[Array, ""]]:
    """``decode_chosen``, and the reconstruction (without bias) by the dead latents alone.

    Args:
      params, x, codes: as ``decode_chosen``; no gradient reaches x.
      dead: this device's dead latents.
      k_aux: how many of all dead latents may serve one row: the largest pre-activations above 0.
        Those equal at the cut are all kept.
      matmul_dtype: dtype of the dense products' inputs.

    Returns:
      (codes, y, y_dead, served): served counts latents that any row of the batch used.
    """
    cut = _dead_cut(*jax.lax.stop_gradient((params, x)), dead, k_aux, matmul_dtype)
    args = (*_own(params, x, codes), *ops.own((listed(dead), cut)))
    owner = ops.own(codes.rows) if isinstance(codes, RaggedCodes) else None
    out: tuple = sparse_affine_aux(*args, matmul_dtype, owner=owner)
    values, y, y_dead, active = out
    served = ops.latents_sum(jnp.sum(ops.rows_sum(active) > 0, dtype=jnp.float32))
    codes = codes.replace(values=values)
    return codes, ops.latents_sum(y), ops.latents_sum(y_dead), served


def _dead_cut(params, x, dead, k_aux, matmul_dtype):
    """[b, 1]: each row's k_aux-th largest pre-activation over all devices' dead latents, or 0."""
    weights = ops.own((x - params["b_dec"][None], params["W_enc"], params["b_enc"]))
    k = min(k_aux, dead.shape[0])

    def search(weights):
        x, W_enc, b_enc = weights
        of_dead = ops.own(listed(dead))
        if ops.latents_count(dead) == dead.shape[0]:
            return dead_cut(x, W_enc, b_enc, of_dead, k, matmul_dtype)
        best = largest(x, W_enc, b_enc, of_dead, k, matmul_dtype)
        everyone = ops.latents_gather(best)
        best, _ = top_k(everyone, min(k_aux, everyone.shape[1]))
        return best[:, -1:]

    def nothing(args):
        return zeros_as((x.shape[0], 1), args[0])

    return jax.lax.cond(ops.latents_sum(jnp.sum(dead)) > k_aux, search, nothing, weights)


def scale_of(x: Float[Array, "b d"], how: Normalize) -> Float[Array, ""]:
    """The constant c with mean ||c x||^2 = 1 over the sample, or 1."""
    if how == "none":
        return jnp.ones(())
    return jax.lax.rsqrt(jnp.mean(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))


def centre(x: Float[Array, "b d"], how: BiasInit) -> Float[Array, " d"]:
    """Where b_dec starts: the sample's geometric median (Weiszfeld, 100 steps), mean, or 0."""
    if how == "zeros":
        return jnp.zeros((x.shape[1],))
    mean = jnp.mean(x, axis=0)
    if how == "mean":
        return mean

    def weiszfeld(_, m):
        weight = 1 / jnp.maximum(jnp.linalg.norm(x - m[None], axis=1), 1e-6)
        return weight @ x / jnp.sum(weight)

    return jax.lax.fori_loop(0, 100, weiszfeld, mean)


def tied_init(key: jax.Array, d: int, n: int) -> Float[Array, "n d"]:
    """Uniform(-1/sqrt(d), 1/sqrt(d)) rows: the encoder, whose unit rows the decoder starts from."""
    bound = d**-0.5
    return jax.random.uniform(key, (n, d), jnp.float32, -bound, bound)


def tally(
    stats: Params, codes: LossCodes, rows: int, dead_after: int
) -> tuple[Params, Bool[Array, " n"]]:
    """(stats with "since_fired" counted on by a batch of ``rows``, which latents are dead now)."""
    fired = sums.fired(codes, stats["since_fired"].shape[0])
    since = since_fired(stats["since_fired"], fired, rows)
    return {**stats, "since_fired": since}, since > dead_after


def latents_for_aux(k_aux: int | None, d: int, n: int) -> int:
    """k_aux, or the power of two nearest to d / 2; at most n."""
    return min(k_aux or 2 ** round(math.log2(max(d / 2, 1))), n)


@property
def aux_latents(sae: Any) -> int:
    """k_aux, or the power of two nearest to d_in / 2, at most n: a property that methods share."""
    return latents_for_aux(sae.k_aux, sae.d_in, sae.n)


LONGEST_COUNT = 2**30  # rows; counters stop here, since an int32 turns negative at 2^31


def since_fired(before: Int[Array, " n"], fired: Bool[Array, " n"], rows: int) -> Int[Array, " n"]:
    """Rows since each latent last fired, after ``rows`` more; saturates beyond 2^30."""
    return jnp.where(fired, 0, jnp.minimum(before, LONGEST_COUNT) + rows).astype(jnp.int32)


def check_k(k: int, n: int) -> None:
    """Raise ValueError where k latents of n cannot be active."""
    if not 1 <= k <= n:
        raise ValueError(f"k={k} active of n={n} latents: k must be in 1..n")


def check_dead_after(tokens: int) -> None:
    """Raise ValueError where ``since_fired`` could never say that a latent is dead."""
    if not 1 <= tokens <= LONGEST_COUNT:
        raise ValueError(f"dead_after_tokens={tokens}: must be in 1..{LONGEST_COUNT} (2^30)")


def used_slots(values: Float[Array, "b k"], indices) -> SparseCodes:
    """Codes in canonical form: index 0 where the value is 0."""
    return SparseCodes(values, jnp.where(values != 0, indices, 0))
