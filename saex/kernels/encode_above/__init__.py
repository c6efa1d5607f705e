"""Encoder and threshold in one op: of each row as many latents as lie above it.

Rows differ by ten times in how many latents they need. What is found comes as lines of a few slots,
each of one row, so that a row takes as many lines as it needs, and a batch has room for the mean of
its rows instead of for the largest of them.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from saex.kernels import late, pick
from saex.kernels.encode_above import reference, xla

IMPLS = {
    "reference": reference.encode_above,
    "cpu": xla.on_cpu,
    "gpu": xla.on_gpu,  # not timed
    # Scalar gathers and scatters are slow there; not timed.
    "tpu": late("saex.kernels.encode_above.tiers", "encode_above"),
}


# Measured on a CPU (experiments/benchmarks/results/ways_cpu.md): latents to each that has room,
# from which on a batch's top k is faster sparsely; and to each that is above its threshold, at
# which a sparse step takes about as long as a dense one (0.9 to 1.15 of it, ReLU's up to 1.5).
PAY_FROM = 16
LEVEL_AT = 32
USUAL = 32, 256  # the least that is worth its bookkeeping, and the most, where L0 is not known


def room_for(capacity: int | None, n: int, k: int | None = None) -> int:
    """Latents of a row, in the mean, that a step has room for; 0: it is done densely.

    Args:
      capacity: as a method was given it; None: what pays.
      n: latents of this device.
      k: how many of a row a batch has, in the mean; None: it is not known.
    """
    if capacity is not None:
        return min(capacity, n)
    if k is not None:
        return 2 * k if PAY_FROM * 2 * k <= n else 0
    least, most = USUAL
    return min(n // LEVEL_AT, most) if n // LEVEL_AT >= least else 0


class Above(NamedTuple):
    """What lies above, in rising order of rows, and of latents within a row.

    Lines that are not used may stand between the others.

    values: float32 [l, s], pre-activations; -inf in a slot that is not used.
    indices: int32 [l, s], their latents; 0 where not used.
    rows: int32 [l], whose each line is; b where none of its slots is used.
    whole: whether there was room for everything. If not, some of it is missing.
    """

    values: Float[Array, "l s"]
    indices: Int[Array, "l s"]
    rows: Int[Array, " l"]
    whole: Bool[Array, ""]


def encode_above(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    least: Float[Array, " n"],
    room: int,
    matmul_dtype: str = "float32",
    impl: str | None = None,
) -> Above:
    """The pre-activations p = (x - b_pre) W_enc^T + b_enc that are above ``least``, and NaN.

    No gradient: ``encode_topk.chosen_scores`` and ``sparse_affine`` make the values functions of
    the encoder again.

    Args:
      x: float32 rows.
      least: one a latent.
      room: for so many latents a row, in the mean of a block of rows (on a CPU of at most 1024).
      matmul_dtype: dtype of the matmul's inputs; it accumulates, and compares, in float32.
      impl: a name from ``IMPLS``, or None for the target's own.

    Raises:
      ValueError: ``room`` below 1, or an unknown ``impl``.
    """
    if room < 1:
        raise ValueError(f"room={room} latents a row: at least 1")
    arrays = jax.lax.stop_gradient((x, b_pre, W_enc, b_enc, least))
    return Above(*pick(IMPLS, impl)(*arrays, min(room, W_enc.shape[0]), matmul_dtype))
