"""FLOPs and bytes of one training step on one device, term by term."""

import dataclasses
import math
from typing import Any

from saex.cost.collectives import is_sparse
from saex.sharding import MeshConfig

ASSUMES = """\
A floor: what the best kernels would take, terms one after the other without overlap.
- s bytes an entry for rows, codes' gathers and the weights that a matmul reads: 2 with
  matmul_dtype bfloat16 (weights then have a bfloat16 copy, written by the optimiser), else 4.
- Sparse codes: pre-activations are not written; selection reads two passes of group maxima, groups
  of about sqrt(n / k), then k groups a row. Decode gathers k rows of W_dec a row. The backward pass
  gathers a row of the residual and one of the batch for each slot in use, and reads W_dec and
  W_enc once; the gradient of the pre-bias is a matrix-vector product.
- Dense codes: every matmul of the autodiff pass (10 b d n FLOPs, no gradient for the batch) and six
  passes over [b, n] arrays.
- Optimiser: Adam reads and writes weights and two moments once, in the pass that makes the
  gradient, projections included: 24 bytes a number (16 with moments in bfloat16), 2 more for a
  bfloat16 copy. With rows split over devices the summed gradient passes through memory too: 8 more.
- AuxK, for the dead latents given: five dense matmuls on a compacted block of them.
- Exchanges: rings along one mesh axis; payloads are float32."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of a step on one device: its FLOPs, its bytes of memory traffic, its bytes sent."""

    name: str
    flops: float | int
    bytes: float | int
    sent: float | int = 0


def of_step(
    sae: Any, batch: int, mesh: MeshConfig, dead: int = 0, moments: str = "float32"
) -> list[Term]:
    """All terms but the exchanges; see ``ASSUMES``."""
    b, n = batch // mesh.data, sae.n // mesh.model
    s = 2 if getattr(sae, "matmul_dtype", "float32") == "bfloat16" else 4
    terms = [Term("encoder matmul", 2.0 * b * sae.d_in * n, s * (n * sae.d_in + b * sae.d_in))]
    if is_sparse(sae):
        terms += _sparse(b, n, min(sae.k, n), sae.d_in, sae.d_out, s)
    else:
        terms += _dense(b, n, sae.d_in, sae.d_out, s)
    if dead:
        terms.append(_aux(b, dead // mesh.model, sae.d_in, sae.d_out, s))
    return [*terms, _optimiser(n * (sae.d_in + sae.d_out), s, mesh, moments)]


def _sparse(b: int, n: int, k: int, d_in: int, d_out: int, s: int) -> list[Term]:
    slots = b * k
    group = 2 ** round(math.log2(max(n / k, 1)) / 2)
    select = 2 * s * b * n / group + s * slots * group + 32 * slots
    gathers = s * slots * (d_in + d_out) + s * n * (d_in + d_out)
    return [
        Term("selection", 0.0, select),
        Term("decode", 2.0 * slots * d_out, s * slots * d_out + 4 * b * d_out),
        Term("backward", 2.0 * slots * (2 * d_out + d_in), gathers),
    ]


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
