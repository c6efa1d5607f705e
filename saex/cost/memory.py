"""What one device holds while a training step runs, in bytes, before anything is compiled.

The state and the batch are known exactly. The rest follows from what the kernels hold: a step is at
its largest in one of a few moments (``Memory.moments``), and a moment is a sum of arrays of known
shapes. How many whole matrices the compiler keeps beside them was read from its buffer assignment:
the counts stand at the top of each table below.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from saex.cost.collectives import is_sparse
from saex.kernels.encode_topk.cpu import ROWS
from saex.kernels.sparse_affine.dead import BLOCK
from saex.kernels.topk.cpu import GROUP
from saex.sharding import MeshConfig, bytes_per_device


@dataclasses.dataclass(frozen=True)
class Held:
    """How many arrays of a kind XLA keeps through a step, as seen in compiled programs.

    Fields:
      matrices: [n, d] beside the state until the update: gradients, and what is made ahead (with
        fsdp: gathered weights).
      fewer: the same where selection is one call: XLA then makes less of it ahead.
      update: [n, d] while the optimiser runs.
      scores: [rows, n] while latents are selected. rows: [b, d] before and after the decoder.
      member: (matrices, rows) that every further member of a stack keeps through the others' parts;
        of one with dense codes all that it has.
    """

    matrices: int
    fewer: int
    update: int
    scores: int
    rows: int
    member: tuple[int, int]


# XLA:CPU of JAX 0.10: two gradients, and Adam's four scalars as matrices, since it fuses the update
# into the sum of squares behind the decoder's norms; the scores once more with their bias.
CPU = Held(matrices=6, fewer=3, update=8, scores=2, rows=4, member=(6, 3))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Fields:
      parameters, optimiser, statistics, batch: what a step is given, exactly; it returns the state
        in place.
      moments: what is held beside them, by the moment in the step. They do not add up.
    """

    parameters: int
    optimiser: int
    statistics: int
    batch: int
    moments: dict[str, int]

    @property
    def temporary(self) -> int:
        """The largest moment."""
        return max(self.moments.values())

    @property
    def total(self) -> int:
        """All that a device holds at most."""
        return self.parameters + self.optimiser + self.statistics + self.batch + self.temporary

    def __str__(self) -> str:
        """One line per part, in MB."""
        given = ("parameters", "optimiser", "statistics", "batch")
        parts = {name: getattr(self, name) for name in given}
        parts |= {f"while: {name}": held for name, held in self.moments.items()}
        lines = [f"a device holds  {self.total / 1e6:,.1f} MB at most, during a step"]
        lines += [f"  {name:20}{held / 1e6:12,.1f} MB" for name, held in parts.items()]
        return "\n".join(lines)


def of_step(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    dtype: str = "bfloat16",
    moments: str = "float32",
    members: int = 1,
) -> Memory:
    """The bytes of one training step with the CPU's kernels.

    Args:
      sae: a dictionary. batch: rows of the global batch. mesh: how rows and latents are split.
      dtype: of the batch. moments: dtype of Adam's. members: of a stack; its temporary arrays are
        known for one device, on several they may be a third more.
    """
    slots = members // mesh.sweep
    specs = sae.specs()
    trainable = {name: s for name, s in specs["params"].items() if s.trainable}
    width = sum(sae.d_in if column == "x" else sae.d_out for column in sae.columns)
    rows = batch // mesh.data
    return Memory(
        parameters=slots * bytes_per_device(specs["params"], mesh),
        optimiser=slots * (2 * bytes_per_device(trainable, mesh) * _itemsize(moments) // 4 + 4),
        statistics=slots * bytes_per_device(specs["stats"], mesh),
        batch=rows * width * _itemsize(dtype),
        moments=_stacked(sae, rows, mesh, slots),
    )


def _stacked(sae: Any, b: int, mesh: MeshConfig, slots: int) -> dict[str, int]:
    """What one member holds, and what the others keep meanwhile."""
    if not is_sparse(sae):
        return {name: slots * held for name, held in _dense(sae, b, mesh).items()}
    _, _, matrix, row = _sizes(sae, b, mesh)
    matrices, rows = CPU.member
    others = (slots - 1) * (matrices * matrix + rows * row)
    return {name: held + others for name, held in _sparse(sae, b, mesh).items()}


def _sparse(sae: Any, b: int, mesh: MeshConfig) -> dict[str, int]:
    n, k, matrix, row = _sizes(sae, b, mesh)
    kept = (CPU.matrices if _two_levels(n, k) else CPU.fewer) * matrix + CPU.rows * row
    if getattr(sae, "matmul_dtype", "float32") == "bfloat16":
        kept += (matrix + row) // 2  # what the encoder's matmul reads
    slots = 4 * 4 * b * k
    block = ROWS if b > ROWS and b % ROWS == 0 else b
    moments = {"selection": kept + slots + CPU.scores * 4 * block * n}
    if getattr(sae, "aux_coefficient", 0):
        gathered = 2 * matrix if mesh.strategy == "fsdp" and mesh.model > 1 else 0
        auxiliary = _auxiliary(sae.aux_latents, b, n, mesh.model)
        moments["auxk"] = kept + slots + gathered + auxiliary
    if mesh.strategy == "tp" or mesh.model > 1:  # else the optimiser sees a small part of each
        moments["update"] = CPU.update * matrix + row
    return moments


def _auxiliary(k_aux: int, b: int, n: int, model: int) -> int:
    """A row's largest dead latents so far, a block's codes, both side by side: the search.

    Then all shards' largest, twice.
    """
    best, block = min(k_aux, n), min(BLOCK, n)
    search = best + block + (best + block)
    gathered = 2 * best * model if model > 1 else 0
    return 4 * b * max(search, gathered)


def _two_levels(n: int, k: int) -> bool:
    """Whether kernels/topk/cpu.py selects groups first."""
    return n % GROUP == 0 and n // GROUP >= 16 * k


def _dense(sae: Any, b: int, mesh: MeshConfig) -> dict[str, int]:
    n, _, matrix, row = _sizes(sae, b, mesh)
    gathered = 1 if mesh.strategy == "fsdp" else 0
    return {
        "codes": 3 * 4 * b * n + (1 + gathered) * matrix + 3 * row,
        "update": (4 + gathered) * matrix + row,
    }


def _sizes(sae: Any, b: int, mesh: MeshConfig) -> tuple[int, int, int, int]:
    """(latents, active ones, bytes of an [n, d], bytes of a [b, d]) of one device's part."""
    n = sae.n // mesh.model
    width = (sae.d_in + sae.d_out) / 2
    return n, min(getattr(sae, "k", n), n), round(4 * n * width), round(4 * b * width)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
