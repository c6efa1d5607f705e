"""One update of a matrix by Adam, of rows that are free or of norm 1.

g' = factor (g - <g, w> w)          of unit rows; factor g of free ones
mu' = b1 mu + (1 - b1) g'           nu' = b2 nu + (1 - b2) g'^2
w' = w - rate (mu' / c1) / (sqrt(nu' / c2) + eps), and of unit rows w' / |w'|

``reference`` is optax's ``scale_by_adam`` between a projection and a normalisation. As such it runs
on CPU and GPU (``train/descent.py``), where XLA makes of it what it can.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from saex.kernels import late, pick
from saex.kernels.adam import reference

ADAM = {
    "reference": reference.adam,
    # One pass, 28 bytes a parameter. XLA for v5e, v5p and v6e makes four over unit rows: 60 bytes
    # of (131072, 4096), 92 of (24576, 768), by its count of the program. Nobody has timed either.
    "tpu": late("saex.kernels.adam.pallas_tpu", "adam"),
    "pallas_tpu": late("saex.kernels.adam.pallas_tpu", "adam"),
}


class Scalars(NamedTuple):
    """float32 scalars of a step: the learning rate, 1 - b1^t, 1 - b2^t, and g's factor.

    Of a factor of 0 g' is 0 even where g is not finite.
    """

    rate: Any
    c1: Any
    c2: Any
    factor: Any


class Updated(NamedTuple):
    """What a step leaves.

    rows, mu, nu: [n, d] float32. squares: sum of squares of the (projected) gradient before its
    factor. total: sum of the new rows, finite if they are.
    """

    rows: Float[Array, "n d"]
    mu: Float[Array, "n d"]
    nu: Float[Array, "n d"]
    squares: Float[Array, ""]
    total: Float[Array, ""]


def adam(
    rows: Float[Array, "n d"],
    g: Float[Array, "n d"],
    mu: Float[Array, "n d"],
    nu: Float[Array, "n d"],
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    unit: bool,
    impl: str | None = None,
) -> Updated:
    """See the module. All float32; a row that is not finite spoils itself and the two sums alone.

    Args:
      rows, g, mu, nu: the matrix, its gradient and its moments. scalars: traced.
      betas: (b1, b2). eps: added to the root. unit: rows have norm 1, and stay so.
      impl: a backend of ``ADAM``.

    Raises:
      ValueError: an unknown ``impl``.
    """
    found = pick(ADAM, impl)(rows, g, mu, nu, scalars, betas, eps, unit)
    return Updated(*found)
