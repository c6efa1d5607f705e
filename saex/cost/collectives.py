"""What devices exchange in one training step: the formulas, in bytes.

Latents split over ``model`` cost a gather of candidate values and a sum of partial reconstructions:
both grow with the batch, not with the dictionary. Rows split over ``data`` cost a sum of gradients:
it grows with the dictionary, not with the batch. So latents are split first, while n is larger than
about half the batch; ``fsdp`` trades the sum of gradients for the same bytes in two halves.
"""

import dataclasses
import math
from typing import Any, Literal

from saex.sharding import DATA, MODEL, MeshConfig

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Fields:
      name: what is exchanged. kind: how.
      axis: the mesh axis whose devices take part. size: how many they are.
      payload: bytes of the whole array that the exchange gathers or sums, on one device.
    """

    name: str
    kind: Kind
    axis: str
    size: int
    payload: int

    @property
    def sent(self) -> float | int:
        """Bytes that each device sends in a ring."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (self.size - 1) / self.size * self.payload


def candidates(rows: int, k: int, n: int, model: int) -> Collective:
    """The top-k values of every shard of latents, gathered for each of ``rows`` local rows."""
    return Collective(
        "candidates", "all-gather", MODEL, model, 4 * rows * min(k, n // model) * model
    )


def reconstruction(rows: int, d_out: int, model: int) -> Collective:
    """Partial reconstructions of ``rows`` local rows, summed over the shards of latents."""
    return Collective("reconstruction", "all-reduce", MODEL, model, 4 * rows * d_out)


def fired(n: int, mesh: MeshConfig) -> Collective:
    """How often each of a device's latents fired, summed over the devices that hold other rows."""
    return Collective("fired", "all-reduce", DATA, mesh.data, 4 * n // mesh.model)


def gradients(trainable: int, mesh: MeshConfig) -> list[Collective]:
    """Gradients of ``trainable`` float32 numbers, those of one shard of latents.

    ``fsdp`` gathers the weights before the step and keeps a part of the summed gradient after it.
    """
    if mesh.strategy == "tp":
        return [Collective("gradients", "all-reduce", DATA, mesh.data, 4 * trainable)]
    return [
        Collective("weights", "all-gather", DATA, mesh.data, 4 * trainable),
        Collective("gradients", "reduce-scatter", DATA, mesh.data, 4 * trainable),
    ]


def of_step(sae: Any, batch: int, mesh: MeshConfig, dead: int = 0) -> list[Collective]:
    """All exchanges of a training step, but for scalars and vectors of d or of b entries.

    Args:
      sae: a dictionary. batch: rows of the global batch.
      mesh: how rows and latents are split.
      dead: width of the block of dead latents that AuxK computes on each device; 0: nothing dead.
    """
    rows = batch // mesh.data
    out = [reconstruction(rows, sae.d_out, mesh.model), fired(sae.n, mesh)]
    if is_sparse(sae):
        out.insert(0, candidates(rows, sae.k, sae.n, mesh.model))
    out += gradients(trainable(sae, mesh.model), mesh)
    if dead:
        out += _auxiliary(sae, rows, mesh, dead)
    return [c for c in out if c.size > 1]


def _auxiliary(sae: Any, rows: int, mesh: MeshConfig, dead: int) -> list[Collective]:
    # The block's forward pass is made twice: it is recomputed in the backward pass.
    block = 4 * dead * (sae.d_in + sae.d_out + 1)
    return [
        Collective("auxk reconstruction", "all-reduce", MODEL, mesh.model, 8 * rows * sae.d_out),
        Collective("auxk gradients", "all-reduce", DATA, mesh.data, block),
    ]


def is_sparse(sae: Any) -> bool:
    """Whether a dictionary's codes are k slots a row rather than n entries."""
    return "indices" in getattr(sae.codes, "__dataclass_fields__", {})


def trainable(sae: Any, model: int = 1) -> int:
    """Entries of the trainable arrays that lie on one of ``model`` shards of latents."""
    total = 0
    for s in sae.specs()["params"].values():
        if s.trainable:
            total += math.prod(s.shape) // (model if "n" in s.axes else 1)
    return total
