"""Pure maps of params to params: the same function written otherwise, or a smaller one.

Params go in and come out as plain dicts of arrays; a map that changes the class, or the number of
latents, takes and returns the dictionary too. Nothing here trains or touches stats.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex.sae import affine, encoders
from saex.sae.adaptive_k import AdaptiveK
from saex.sae.crosscoder import Crosscoder
from saex.sae.encoders import entries
from saex.sae.gated import Gated
from saex.sae.gated import as_jump_relu as gated_as_jump_relu
from saex.sae.group_bias import GroupBias
from saex.sae.group_max import GroupMax
from saex.sae.guided import Guided
from saex.sae.jump_relu import JumpReLU
from saex.sae.jump_relu_tanh import JumpReLUTanh
from saex.sae.matryoshka import Matryoshka
from saex.sae.relu import ReLU
from saex.typing import Params

OPEN = 1e-30  # a threshold of 0, whose log would be -inf

# ------------------------------------------------------------------------- the same, in other units


def fold_scale(params: Params) -> Params:
    """Put the input scale into the weights: ``scale`` becomes 1, codes and outputs stay the same.

    For affine encoders and decoders, whatever the activation: W_enc * c, W_dec / c, b_dec / c,
    with b_enc untouched, and thresholds, with which latents are compared. This is the form in which
    weights are handed to other libraries, which feed raw activations. Decoder rows then have norm
    1/c. Of transcoders, which write rows of another kind, ``y_scale`` becomes 1 too. A scale may
    be one number for each entry of a row (of crosscoders). Where the atoms are the encoder as well
    (matching pursuit, no W_enc) they stay unit vectors. What training alone reads follows: the
    encoder of a variance, a tied encoder's amplitude, the scale of gradients.
    """
    c = params["scale"]
    out = params.get("y_scale", c)
    folded = {**params, "scale": c / c, "b_dec": params["b_dec"] / out}
    if "W_enc" in params:
        folded["W_enc"] = params["W_enc"] * entries(c)
        folded["W_dec"] = params["W_dec"] / entries(out)
    if "b_in" in params:
        folded["b_in"] = params["b_in"] / c
    if "W_skip" in params:
        folded["W_skip"] = params["W_skip"] * (c / out)
    for name, factor in (("gradient_scale", c), ("W_var", c), ("amplitude", 1 / c**2)):
        if name in params:  # effects are |g W_dec^T|; W_dec is amplitude * W_enc
            folded[name] = params[name] * factor
    if "y_scale" in params:
        folded["y_scale"] = out / out
    return folded


def fold_decoder_norms(params: Params) -> Params:
    """Decoder rows of norm 1: latent i's code becomes f_i ||W_dec,i||, outputs stay the same.

    The size of a code is then what the latent adds to the output (in scaled units), which is what
    latents, and dictionaries, are compared by. W_enc, b_enc and thresholds of latent i are
    multiplied by the norm, so the same latents are active of ReLU, JumpReLU, gated and thresholded
    dictionaries. Of TopK with free norms the choice may change: there codes compete. A latent whose
    decoder row is 0 stays as it is. ``guided.detect`` reads pre-activations as they were trained:
    not after this.

    Raises:
      ValueError: params without an affine encoder, or one threshold for latents of unequal norms.
    """
    if "W_enc" not in params:
        raise ValueError("no W_enc among the params: where atoms encode too, they are unit vectors")
    if jnp.ndim(params["W_enc"]) != 2:
        raise ValueError(
            f"W_enc {jnp.shape(params['W_enc'])} holds units that latents share (KronSAE): no code "
            "can be scaled alone; decoder rows are of one norm already"
        )
    norms = jnp.linalg.norm(params["W_dec"], axis=1)
    return _grown(params, jnp.where(norms > 0, norms, 1.0))


def _grown(params: Params, factor: Float[Array, " n"]) -> dict[str, Array]:
    """Latents' codes times a factor above 0, decoder rows over it."""
    if jnp.ndim(params.get("threshold", factor)) == 0 and np.ptp(factor) > 1e-4 * np.max(factor):
        raise ValueError(
            "one threshold for all latents, which would be compared in units of their own: "
            "to_jump_relu first, which gives each latent one"
        )
    made = {**params, "W_dec": params["W_dec"] / factor[:, None]}
    made["W_enc"] = params["W_enc"] * factor[:, None]
    for name in ("b_enc", "b_mag", "threshold"):
        if name in params:
            made[name] = params[name] * (factor if jnp.ndim(params[name]) else factor[0])
    if "log_threshold" in params:
        made["log_threshold"] = params["log_threshold"] + jnp.log(factor)
    if "amplitude" in params:
        made["amplitude"] = params["amplitude"] / jnp.square(factor)
    return made


# ------------------------------------------------------------------------------------- thresholds


def estimate_threshold(
    sae: Any, params: Params, x: Any, k: int | float | None = None, batch: int = 1024
) -> Float[Array, "*n"]:
    """The threshold above which ``k`` pre-activations a row are, on average over these rows.

    One number for all latents, by which inference no longer looks at other rows or latents. Unlike
    a running mean of a training batch's smallest value it has no lag, does not depend on the size
    of a batch, and gives the L0 it is asked for. Of AbsTopK it is one of |p|. Of BatchCrosscoder,
    which compares p N, it is that over N: one for each latent.

    Args:
      sae, params: a dictionary with an affine encoder (``encoders.sizes``) and its params.
      x: raw rows [rows, d]; some thousands, of another part than what is evaluated.
      k: None: ``sae.k``, where rows have as many on average.
      batch: rows whose pre-activations [batch, n] are held at once.

    Returns:
      A float32 in the units of codes, at least 0; above it lie as many values as asked for, or all
      that are positive.

    Raises:
      ValueError: no k; a method whose codes are no pre-activations, or are opened by other numbers.
    """
    if k is None:
        k = None if isinstance(sae, AdaptiveK) else getattr(sae, "k", None)
    if k is None:
        raise ValueError(f"{type(sae).__name__} has no mean number of active latents: give k")
    wanted, keep = round(k * len(x)), min(sae.n, int(4 * k) + 64)
    while True:
        each = [_largest(sae, params, x[i : i + batch], keep) for i in range(0, len(x), batch)]
        values = np.concatenate([values for values, _ in each])
        positive = np.sort(values[values > 0])[::-1]
        found = 0.0
        if len(positive) > wanted:
            found = (positive[wanted - 1] + positive[wanted]) / 2
        if keep == sae.n or values[:, -1].max() <= found:
            return jnp.asarray(found / each[0][1], jnp.float32)
        keep = min(sae.n, 4 * keep)  # some row had more to give


def _largest(sae: Any, params: Params, x: Any, keep: int) -> tuple[np.ndarray, Any]:
    """([b, keep]: what raw rows select by, largest first; its units)."""
    values, units = encoders.sizes(sae, params, x)
    return np.asarray(jax.lax.top_k(values, keep)[0]), units


# -------------------------------------------------------------------------- of one class to another

# What is not f = p where p > theta, x_hat = f W_dec + b_dec of one row, and why.
NO_JUMP_RELU = {
    "AbsTopK": "its codes have signs",
    "KronSAE": "its latents are pairs of units",
    "MatchingPursuit": "its latents are taken one after the other",
    "MultiLayer": "it standardises each row; encode rows that are, with a TopK of these params",
    "SkipTranscoder": "it writes other rows than it reads, by a linear path too",
    "Transcoder": "it writes other rows than it reads",
}


def to_jump_relu(
    sae: Any, params: Params, threshold: Any = None
) -> tuple[JumpReLU, dict[str, Array]]:
    """The dictionary as a JumpReLU, a threshold for each latent.

    The same function are, at inference, ReLU, Gated, GroupBias, JumpReLUTanh, BatchTopK and what
    selects as it does, and crosscoders (of all sites side by side, their scales in the weights).
    TopK and its kin are not: with the ``threshold`` of ``estimate_threshold`` their mean L0 stays,
    and rows' L0 varies.

    Args:
      sae, params: a dictionary and its params.
      threshold: a number or one for each latent, in the units of codes; None: the dictionary's own.

    Raises:
      ValueError: none of its own, and none given; a class that is no JumpReLU, with the reason.
    """
    kind = type(sae).__name__
    known = (*encoders.CENTRED, *encoders.NOT_CENTRED, *encoders.APART)
    if kind in NO_JUMP_RELU or not isinstance(sae, known):
        raise ValueError(f"{kind} is no JumpReLU: {NO_JUMP_RELU.get(kind, 'it is not known here')}")
    params, own = _with_threshold(sae, _centred(sae, params))
    theta = own if threshold is None else jnp.asarray(threshold, jnp.float32)
    if theta is None:
        raise ValueError(
            f"a {kind} has no threshold: give one, by estimate_threshold(sae, params, x)"
        )
    theta = jnp.maximum(jnp.broadcast_to(theta, (sae.n,)), OPEN)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "scale")
    made = {**{name: params[name] for name in names}, "log_threshold": jnp.log(theta)}
    shared = ("dead_after_tokens", "normalize", "b_dec_init", "matmul_dtype")
    fields = {name: getattr(sae, name) for name in shared if hasattr(sae, name)}
    return JumpReLU(sae.d_in, sae.n, **fields), made


def _centred(sae: Any, params: Params) -> Params:
    """The same function, written with one scale and with b_dec taken from the input."""
    if not isinstance(sae, encoders.NOT_CENTRED):
        return params
    if jnp.ndim(params["scale"]):
        params = {**fold_scale(params), "scale": jnp.ones(())}
    return {**params, "b_enc": params["b_enc"] + params["W_enc"] @ params["b_dec"]}


def _with_threshold(sae: Any, params: Params) -> tuple[Params, Any]:
    """(params whose pre-activations are codes, from which value on; None: that is not in them)."""
    if isinstance(sae, Gated):
        params = gated_as_jump_relu(params)
    if isinstance(sae, Gated | JumpReLU | JumpReLUTanh):
        return params, jnp.exp(params["log_threshold"])
    if isinstance(sae, GroupBias) and not sae.relu:
        return {**params, "b_enc": params["b_enc"] * 0}, -params["b_enc"]
    if isinstance(sae, ReLU | Crosscoder | GroupBias):
        return params, jnp.zeros(())
    return params, params.get("threshold")


# ------------------------------------------------------------------------------------ fewer latents


def prune(sae: Any, params: Params, keep: Any) -> tuple[Any, dict[str, Array]]:
    """The dictionary without the other latents.

    Where latents do not compete (ReLU, JumpReLU, thresholds), and where those that go were dead,
    codes of those that stay are the same. Matryoshka's prefixes keep what is left of them; targets
    of GroupBias, which training alone reads, go by the new places.

    Args:
      sae, params: a dictionary and its params, whole.
      keep: bool [n], or the numbers of the latents that stay, in the order they shall have.

    Returns:
      (the dictionary with fewer latents, its params). On a mesh n must stay a multiple of the
      devices that share latents: keep some more.

    Raises:
      ValueError: none or unknown latents, fewer than k, a structure in which latents are no rows,
        or whose places mean something that they would no longer (groups, concepts, prefixes).
    """
    keep = np.asarray(keep)
    keep = np.flatnonzero(keep) if keep.dtype == bool else keep
    if not keep.size or keep.min() < 0 or keep.max() >= sae.n or len(set(keep)) < keep.size:
        raise ValueError(f"keep={keep}: the numbers of some latents in 0..{sae.n - 1}, each once")
    made = {}
    for name, spec in sae.specs()["params"].items():
        a = params[name]
        for axis, logical in enumerate(spec.axes):
            if logical == "n" and spec.shape[axis] != sae.n:
                raise ValueError(
                    f"{name} of {type(sae).__name__} has {spec.shape[axis]} entries for {sae.n} "
                    "latents: its latents cannot be taken apart"
                )
            a = jnp.take(a, keep, axis=axis) if logical == "n" else a
        made[name] = a
    return dataclasses.replace(sae, n=int(keep.size), **_places(sae, keep)), made


def _places(sae: Any, keep: np.ndarray) -> dict[str, Any]:
    """Fields that change with the latents' places; raises ValueError where these may not change."""
    if isinstance(sae, Guided) and not np.array_equal(
        keep[: sae.concepts], np.arange(sae.concepts)
    ):
        raise ValueError(
            f"Guided: the first latents are the concepts, so keep has to begin with "
            f"0..{sae.concepts - 1}, in this order"
        )
    if isinstance(sae, GroupMax):
        left = np.repeat(np.arange(sae.k), keep.size // sae.k)
        if not np.array_equal(keep // (sae.n // sae.k), left):
            raise ValueError(
                f"GroupMax: latents compete in {sae.k} groups of {sae.n // sae.k} that follow each "
                "other; equally many of each have to stay, groups in their order"
            )
    if not isinstance(sae, Matryoshka) or sae.sampled:
        return {}
    prefix = np.searchsorted(sae.prefixes, keep, side="right")
    counts = np.bincount(prefix, minlength=len(sae.prefixes))
    if np.any(np.diff(prefix) < 0) or not counts.all():
        raise ValueError(
            f"Matryoshka: of each group between the prefixes {sae.prefixes} some latents have to "
            "stay, groups in their order"
        )
    return {"fractions": tuple((counts / keep.size).tolist())}


def alike(params: Params, cosine: float = 0.95) -> list[list[int]]:
    """Groups of latents whose decoder rows point the same way, the lowest number of each first.

    Greedy: a latent joins the first group whose first member it has at least this cosine with.
    Latents that are like no other are left out. [n, n] cosines are made, a block at a time.
    """
    W = np.asarray(affine.unit_rows(jnp.asarray(params["W_dec"])))
    n, taken, groups = len(W), np.zeros(len(W), bool), []
    for start in range(0, n, 1024):
        close = W[start : start + 1024] @ W.T >= cosine
        for i in range(start, min(start + 1024, n)):
            if taken[i]:
                continue
            others = np.flatnonzero(close[i - start] & ~taken)
            others = others[others > i]
            taken[i] = True
            if others.size:
                taken[others] = True
                groups.append([i, *others.tolist()])
    return groups


def merge(sae: Any, params: Params, groups: list[list[int]]) -> tuple[Any, dict[str, Array]]:
    """One latent in place of each group, in the place of its first: for near copies (``alike``).

    Encoder rows, biases and thresholds are averaged, decoder rows summed: what members that are
    equal, and so fire together, write together. The sum's length goes into the code, so that
    decoder norms stay what they were on average. Exact for equal members where latents do not
    compete; of TopK the slots that they took are free for others.

    Args:
      sae, params: a dictionary and its params, whole.
      groups: latents of each group.

    Raises:
      ValueError: a latent in two groups; as ``prune`` and ``fold_decoder_norms``.
    """
    if len({i for g in groups for i in g}) < sum(len(g) for g in groups):
        raise ValueError("a latent stands in two groups, or twice in one")
    specs, made = sae.specs()["params"], {k: np.array(v) for k, v in params.items()}
    factor = np.ones(sae.n, np.float32)
    for group in groups:
        for name, a in made.items():
            if specs[name].axes[:1] == ("n",):
                total = np.asarray(params[name])[group].sum(axis=0)
                a[group[0]] = total if name == "W_dec" else total / len(group)
        norm = np.linalg.norm(np.asarray(params["W_dec"])[group], axis=1).mean()
        factor[group[0]] = np.linalg.norm(made["W_dec"][group[0]]) / max(norm, 1e-30) or 1
    gone = {i for group in groups for i in group[1:]}
    keep = np.array([i for i in range(sae.n) if i not in gone])
    grown = _grown({k: jnp.asarray(v) for k, v in made.items()}, jnp.asarray(factor))
    return prune(sae, grown, keep)
