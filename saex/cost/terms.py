"""FLOPs and bytes of one training step on one device, term by term."""

import dataclasses
import math
from typing import Any

from saex.cost.slots import Slots, examples, slots
from saex.sharding import MeshConfig

ASSUMES = """\
A floor: what the best kernels would take, terms one after the other without overlap.
- s bytes an entry for rows, codes' gathers and the weights that a matmul reads: 2 with
  matmul_dtype bfloat16 (weights then have a bfloat16 copy, written by the optimiser), else 4.
- The batch: rows of 2 bytes an entry, written once, for all members of a stack together. They come
  while the step before runs: at the rate given, a step takes as long as they do, or its own time.
- Sparse codes: pre-activations are not written; selection reads two passes of group maxima, groups
  of about sqrt(n / k), then k groups a row. Decode gathers k rows of W_dec a row. The backward pass
  gathers a row of the residual and one of the batch for each slot in use, and reads W_dec and
  W_enc once; the gradient of the pre-bias is a matrix-vector product.
- Methods with dense codes that train on what they find write it, with its places, as much as has
  room, and read it, once more for a cut over the batch. Decode and backward gather what is in use:
  k a row, an l0_target, else `active` or an eighth of the room. The dense fallback is not priced.
- Dense codes: every matmul of the autodiff pass (10 b d n FLOPs, no gradient for the batch) and six
  passes over [b, n] arrays.
- Optimiser: Adam reads and writes weights and two moments once, in the pass that makes the
  gradient, projections included: 24 bytes a number (16 with moments in bfloat16), 2 more for a
  bfloat16 copy. With rows split over devices the summed gradient passes through memory too: 8 more.
- AuxK, for the dead latents given: five dense matmuls on a compacted block of them.
- Exchanges: rings along one mesh axis; payloads are float32.
An affine encoder and decoder is priced: not what a method's own structure saves or repeats."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a step on one device: its FLOPs, its bytes of memory traffic, its bytes sent."""

    name: str
    flops: float | int
    bytes: float | int
    sent: float | int = 0


def batch(sae: Any, rows: int, mesh: MeshConfig) -> Term:
    """The rows of a batch arrive: what all members of a stack share."""
    width = sum(sae.d_in if column == "x" else sae.d_out for column in sae.columns)
    return Term("batch", 0, 2 * rows // mesh.data * examples(sae) * width)


def of_step(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    dead: int = 0,
    moments: str = "float32",
    active: float | int | None = None,
) -> list[Term]:
    """All terms of one member but the exchanges; see ``ASSUMES``."""
    b, n = batch // mesh.data * examples(sae), sae.n // mesh.model
    s = 2 if getattr(sae, "matmul_dtype", "float32") == "bfloat16" else 4
    terms = [Term("encoder matmul", 2.0 * b * sae.d_in * n, s * (n * sae.d_in + b * sae.d_in))]
    per_row = slots(sae, mesh.model, active)
    if per_row.chosen:
        terms += _sparse(b, n, per_row, sae.d_in, sae.d_out, s)
    else:
        terms += _dense(b, n, sae.d_in, sae.d_out, s)
    if dead:
        terms.append(_aux(b, dead // mesh.model, sae.d_in, sae.d_out, s))
    return [*terms, _optimiser(n * (sae.d_in + sae.d_out), s, mesh, moments)]


def _sparse(b: int, n: int, per_row: Slots, d_in: int, d_out: int, s: int) -> list[Term]:
    used, parts = b * per_row.used, per_row.parts
    gathers = s * used * (d_in + d_out) + s * n * (d_in + d_out)
    found = b * per_row.chosen
    select = selection(b, n, per_row.chosen, s) if per_row.top else 16 * found
    select += 4 * found if per_row.batch else 0
    return [
        Term("selection", 0.0, select),
        Term("decode", 2.0 * used * d_out, s * used * d_out + 4 * b * d_out * parts),
        Term("backward", 2.0 * used * (2 * d_out + d_in), gathers),
    ]


def selection(b: int, n: int, k: int, s: int = 4) -> float | int:
    """Bytes of the k largest of n in each of b rows whose group maxima are written."""
    group = 2 ** round(math.log2(max(n / k, 1)) / 2)
    return 2 * s * b * n / group + s * b * k * group + 32 * b * k


def _dense(b: int, n: int, d_in: int, d_out: int, s: int) -> list[Term]:
    codes = s * b * n
    weights = s * n * (d_in + d_out)
    return [
        Term("decode", 2.0 * b * n * d_out, 2 * codes + s * n * d_out + 4 * b * d_out),
        Term("backward", 2.0 * b * n * (2 * d_out + d_in), 4 * codes + weights),
    ]


def _aux(b: int, dead: int, d_in: int, d_out: int, s: int) -> Term:
    flops = 2.0 * b * dead * (2 * d_in + 3 * d_out)
    return Term("auxk", flops, 4 * s * b * dead + 3 * s * dead * (d_in + d_out))


def _optimiser(numbers: int, s: int, mesh: MeshConfig, moments: str) -> Term:
    split = mesh.data if mesh.strategy == "fsdp" else 1
    each = 8 + (8 if moments == "bfloat16" else 16)
    each += (2 if s == 2 else 0) + (8 if mesh.data > 1 else 0)
    return Term("optimiser", 0, each * numbers / split)
