"""What methods on the rows of several sites share: rows lie side by side, ``widths`` says how wide.

A row [d] of widths (d_1, .., d_p) is x^1, .., x^p one behind the other; so are rows of encoder and
decoder. A site's part of an array is picked by a mask, never by a slice: the entries of weights may
be split over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex.sae import affine, losses


def check_widths(widths: tuple[int, ...], d: int) -> None:
    """Raise ValueError where the sites do not make up rows of width d."""
    if min(widths, default=0) < 1 or sum(widths) != d:
        raise ValueError(
            f"widths={widths} of the sites side by side, d_in={d}: their sum must be d_in; give "
            "one width for each site of config.site ('a+b')"
        )


def masks(widths: tuple[int, ...]) -> Float[np.ndarray, "p d"]:
    """1 where an entry of a row belongs to the site."""
    owner = np.repeat(np.arange(len(widths)), widths)
    return (owner[None] == np.arange(len(widths))[:, None]).astype(np.float32)


def squares(rows: Float[Array, "n d"], widths: tuple[int, ...]) -> Float[Array, "n p"]:
    """Each row's sum of squares at each site."""
    each = [jnp.sum(jnp.square(rows) * mask[None], axis=1) for mask in masks(widths)]
    return jnp.stack(each, axis=1)


def norms(rows: Float[Array, "n d"], widths: tuple[int, ...]) -> Float[Array, "n p"]:
    """Each row's norm at each site; where that is 0 its gradient is 0."""
    s = squares(rows, widths)
    return jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, s, 1.0)), 0.0)


def scales(
    x: Float[Array, "b d"], widths: tuple[int, ...], how: affine.Normalize
) -> Float[Array, " d"]:
    """One constant for each site, at each of its entries: with it mean ||x^l||^2 = 1, or 1."""
    if how == "none":
        return jnp.ones((x.shape[1],))
    mean = jnp.mean(squares(x.astype(jnp.float32), widths), axis=0)
    return jax.lax.rsqrt(jnp.maximum(mean, 1e-30)) @ masks(widths)


def fvus(
    x: Float[Array, "b d"], residual: Float[Array, "b d"], widths: tuple[int, ...]
) -> dict[str, Float[Array, ""]]:
    """{"fvu_0": .., "fvu_1": ..}: the FVU of each site, from one device's part of a batch."""
    each = masks(widths)[:, None]
    return {f"fvu_{i}": losses.fvu(x * mask, residual * mask) for i, mask in enumerate(each)}


def relative_norms(params: dict, widths: tuple[int, ...]) -> Float[Array, "n p"]:
    """Where a crosscoder's latents live: decoder norms at each site over the largest of the latent.

    In the units of the loss, in which all sites have equal mean square norm. 1 at the site where
    the latent is strongest, 0 where it writes nothing.

    Args:
      params: of a crosscoder, with its scale (not folded: raw units would favour loud sites).
      widths: its field.
    """
    each = norms(jnp.asarray(params["W_dec"]), widths)
    return each / jnp.maximum(jnp.max(each, axis=1, keepdims=True), 1e-30)


def difference(
    params: dict, widths: tuple[int, ...], one: int = 0, other: int = 1
) -> Float[Array, " n"]:
    """(1 + (||W^other|| - ||W^one||) / max) / 2 of each latent: 0 only at ``one``, 1/2 shared.

    The measure of model diffing (Lindsey et al. 2024; Minder et al. 2025, arXiv 2504.02922): 1
    where a latent writes to ``other`` alone. Cuts in use: below 0.1, 0.4 to 0.6, above 0.9.
    """
    each = norms(jnp.asarray(params["W_dec"]), widths)
    a, b = each[:, one], each[:, other]
    return (1 + (b - a) / jnp.maximum(jnp.maximum(a, b), 1e-30)) / 2
