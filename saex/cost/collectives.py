"""What devices exchange in one training step: the formulas, in bytes.

Latents split over ``model`` cost a gather of candidate values and a sum of partial reconstructions:
both grow with the batch, not with the dictionary. Rows split over ``data`` cost a sum of gradients:
it grows with the dictionary, not with the batch. So latents are split first, while n is larger than
about half the batch; ``fsdp`` trades the sum of gradients for the same bytes in two halves.
"""

import dataclasses
import math
from typing import Any, Literal

from saex.cost.slots import examples, is_sparse, slots
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


def gradients(sae: Any, mesh: MeshConfig) -> list[Collective]:
    """The float32 gradients of the trainable arrays, summed over the devices that hold other rows.

    ``fsdp`` gathers what is stored in parts before the step and keeps a part of the sum after it;
    the norms of rows that lie in parts are sums too: one for the projection of the gradient, one
    for the weights' own.
    """
    data, whole = mesh.data, 4 * trainable(sae, mesh.model)
    if mesh.strategy == "tp":
        return [Collective("gradients", "all-reduce", DATA, data, whole)]
    split = 4 * trainable(sae, mesh.model, "d")
    return [
        Collective("weights", "all-gather", DATA, data, split),
        Collective("gradients", "reduce-scatter", DATA, data, split),
        Collective("biases", "all-reduce", DATA, data, whole - split),
        Collective("row norms", "all-reduce", DATA, data, 8 * sae.n // mesh.model),
    ]


def auxiliary(sae: Any, rows: int, mesh: MeshConfig, dead: int) -> list[Collective]:
    """AuxK: the dead latents' own reconstruction, and which of them any row used.

    Where more of them are ``dead`` than may serve a row, their largest pre-activations are gathered
    as candidates are. The gradients are added into the others before those are summed.
    """
    wanted = sae.aux_latents
    each = min(wanted, sae.n // mesh.model) if dead > wanted else 0
    found = [
        Collective(
            "auxk candidates", "all-gather", MODEL, mesh.model, 4 * rows * each * mesh.model
        ),
        Collective("auxk reconstruction", "all-reduce", MODEL, mesh.model, 4 * rows * sae.d_out),
        Collective("auxk fired", "all-reduce", DATA, mesh.data, 4 * sae.n // mesh.model),
    ]
    return [c for c in found if c.payload]


def of_step(sae: Any, batch: int, mesh: MeshConfig, dead: int = 0) -> list[Collective]:
    """All exchanges of a training step, but for scalars and vectors of d or of b entries.

    Args:
      sae: a dictionary. batch: rows of the global batch.
      mesh: how rows and latents are split.
      dead: latents that count as dead, over all shards.
    """
    rows, parts = batch // mesh.data * examples(sae), slots(sae, mesh.model).parts
    found = [reconstruction(rows * parts, sae.d_out, mesh.model), fired(sae.n, mesh)]
    if is_sparse(sae):
        found.insert(0, candidates(rows, sae.k, sae.n, mesh.model))
    found += gradients(sae, mesh)
    if getattr(sae, "aux_coefficient", 0):
        found += auxiliary(sae, rows, mesh, dead)
    return [c for c in found if c.size > 1]


def trainable(sae: Any, model: int = 1, axis: str | None = None) -> int:
    """Entries of the trainable arrays (with that logical axis) on one of ``model`` shards."""
    total = 0
    for s in sae.specs()["params"].values():
        if s.trainable and (axis is None or axis in s.axes):
            total += math.prod(s.shape) // (model if "n" in s.axes else 1)
    return total
