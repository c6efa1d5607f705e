"""What one device holds while a training step runs, in bytes, before anything is compiled.

The state and the batch are known exactly. The rest follows from what the kernels hold: a step is at
its largest in one of a few moments (``Memory.moments``), and a moment is a sum of arrays of known
shapes. How many whole matrices the compiler keeps beside them was read from its buffer assignment:
the counts stand in the tables below, for CPUs and TPUs. There is none for GPUs.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from saex.cost.slots import is_sparse, room, slots
from saex.kernels.sparse_affine.dead import ROWS, block
from saex.kernels.sparse_decode.cpu import NARROW, sorted_at_once
from saex.kernels.topk.cpu import GROUP, block_rows, by_network
from saex.sharding import MeshConfig, bytes_per_device


@dataclasses.dataclass(frozen=True)
class Held:
    """How many arrays of a kind XLA keeps through a step, as seen in compiled programs.

    Fields:
      matrices: [n, d] beside the state until the update: gradients, and what is made ahead (with
        fsdp: gathered weights).
      fewer: the same where selection is one call: XLA then makes less of it ahead.
      update: [n, d] while the optimiser runs.
      scores: [rows, n] while latents are selected; one more where that is one call.
      rows: [b, d] before and after the decoder.
      member: (matrices, rows) that every further member of a stack keeps through the others' parts;
        of one that is done densely all that it has.
    """

    matrices: int
    fewer: int
    update: int
    scores: int
    rows: int
    member: tuple[int, int]


# XLA:CPU of JAX 0.10: two gradients, and Adam's scalars as matrices, since it fuses the update into
# the sum of squares behind the decoder's norms.
CPU = Held(matrices=5, fewer=2, update=8, scores=1, rows=3, member=(6, 2))


@dataclasses.dataclass(frozen=True)
class HeldByTPU:
    """How many arrays of a kind are in a TPU's memory; its kernels hold no [b, n] there.

    [b, k] arrays do not count: their long axis lies in the lanes, so nothing pads them.

    Fields:
      gradients: [n, d] when the backward pass over the latents writes its two.
      weights: the same of what AuxK's loops read, made before them and kept: both weights in
        bfloat16, as which a TPU multiplies float32 too.
      gathered: the same with fsdp: both weights whole.
      update: the same where optax is the optimiser: the decoder's gradient once more, projected.
        Where it is one kernel (``kernels.adam``) it works in place.
      rows: [b, d] meanwhile: the kernel's operand of both x and the gradient, and x in bfloat16.
      half, whole: [b, n] of the gradient of dense codes: in bfloat16, or with latents split.
    """

    gradients: int
    weights: int
    gathered: int
    update: int
    rows: float
    half: float
    whole: float


@dataclasses.dataclass(frozen=True)
class HeldDensely:
    """The same of dense codes, whose gradient is autodiff's.

    Fields:
      scores: [b, n] at once. matrices, aux: [n, d] meanwhile; how many more AuxK keeps.
      rows: [b, d] meanwhile. update: [n, d] while the optimiser runs; AuxK keeps ``update_aux``
        more.
    """

    scores: int
    matrices: int
    aux: int
    rows: int
    update: int
    update_aux: int


# Codes and a gradient, or scores; and of methods with a threshold or a cut one array more. That
# many where rows are a multiple of 16 (``sae.sums``); else it may be one more. Methods that train
# on what they find are larger in the dense branch, which is there to fall back to: so they count as
# dense on a CPU. Of them a further member of a stack keeps what leaves its branches.
PLAIN = HeldDensely(scores=2, matrices=2, aux=0, rows=3, update=4, update_aux=0)
FOUND = (2, 1)  # as ``Held.member``
CUT = HeldDensely(scores=3, matrices=5, aux=2, rows=3, update=8, update_aux=4)
# [b, n] arrays beside these of methods that make more of all scores than codes.
MORE = {"Gated": 1, "TopAFA": 1, "GroupBias": 1, "JumpReLUTanh": 2}


# The TPU compiler of JAX 0.10 (libtpu 0.0.42), for v5e, v5p and v6e.
TPU = HeldByTPU(gradients=2, weights=1, gathered=2, update=3, rows=2.5, half=0.5, whole=1.0)
# On-chip memory of a core (JAX's table of TPUs): arrays that fit into it together stay there, but
# not those of loops and branches.
VMEM = {"v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20}


# As in train/state.py: larger arrays are made in parts, each device its own.
WHOLE = 2**30
PROBES = 256  # rows that many methods scale their encoder by


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Fields:
      parameters, optimiser, statistics, batch: what a step is given, exactly; it returns the state
        in place.
      moments: what is held beside them, by the moment in the step. They do not add up.
      kernels: whose they are: "cpu" or a TPU's name.
      start: while the state is made, in all; about.
    """

    parameters: int
    optimiser: int
    statistics: int
    batch: int
    moments: dict[str, int]
    kernels: str = "cpu"
    start: int = 0

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
        most = f"a device holds  {self.total / 1e6:,.1f} MB at most"
        lines = [f"{most}, during a step with the kernels for {self.kernels}"]
        lines += [f"  {name:20}{held / 1e6:12,.1f} MB" for name, held in parts.items()]
        lines.append(f"and about {self.start / 1e6:,.1f} MB before, while the state is made")
        return "\n".join(lines)


def of_step(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    dtype: str = "bfloat16",
    moments: str = "float32",
    members: int = 1,
    hardware: str = "cpu",
) -> Memory:
    """The bytes of one training step.

    Args:
      sae: a dictionary. batch: rows of the global batch. mesh: how rows and latents are split.
      dtype: of the batch. moments: dtype of Adam's. members: of a stack; its temporary arrays are
        known for one device, on several they may be a third more.
      hardware: a name from ``VMEM``: that TPU's kernels; any other: the CPU's. On a TPU it is what
        the step cannot do without: where there is room, its compiler leaves holes between arrays
        and reports them as temporary memory, up to 3 [n, d] of them; given less, it closes them.
        A TPU's stacks were not compared: the temporary arrays of all members are added up.
    """
    slots = members // mesh.sweep
    specs = sae.specs()
    trainable = {name: s for name, s in specs["params"].items() if s.trainable}
    width = sum(sae.d_in if column == "x" else sae.d_out for column in sae.columns)
    rows = batch // mesh.data
    if on_tpu := hardware in VMEM:
        held = _on_tpu(sae, rows, mesh, slots, VMEM[hardware], moments)
    else:
        held = _stacked(sae, rows, mesh, slots)
    parameters = slots * bytes_per_device(specs["params"], mesh)
    optimiser = slots * (2 * bytes_per_device(trainable, mesh) * _itemsize(moments) // 4 + 4)
    statistics = slots * bytes_per_device(specs["stats"], mesh)
    return Memory(
        parameters=parameters,
        optimiser=optimiser,
        statistics=statistics,
        batch=rows * width * _itemsize(dtype),
        moments=held,
        kernels=hardware if on_tpu else "cpu",
        start=parameters + optimiser + statistics + _start(sae, mesh),
    )


def _start(sae: Any, mesh: MeshConfig) -> int:
    """What is held beside the states while the last one is made, a state at a time."""
    sizes = {name: 4 * math.prod(s.shape) for name, s in sae.specs()["params"].items()}
    largest, devices = max(sizes.values()), mesh.data * mesh.model
    probes = PROBES * (4 * sae.n + 4 * getattr(sae, "k", 0) * sae.d_out)
    if devices == 1:
        return 2 * largest + probes
    if largest <= WHOLE:
        return 4 * largest + probes  # of which the layout in parts is a copy
    return 2 * largest // devices + 2 * probes


def _on_tpu(
    sae: Any, b: int, mesh: MeshConfig, slots: int, vmem: int, dtype: str
) -> dict[str, int]:
    n, _, matrix, row = _sizes(sae, b, mesh)
    has_aux = bool(getattr(sae, "aux_coefficient", 0))
    kept = (TPU.weights if has_aux else 0) + (TPU.gathered if mesh.strategy == "fsdp" else 0)
    if is_sparse(sae):
        moments = {"gradients": (TPU.gradients + kept) * matrix + TPU.rows * row}
        if dtype != "float32" or mesh.sweep > 1:  # see train/descent.py
            moments["update"] = TPU.update * matrix
    else:
        codes = 4 * b * n
        gradient = (TPU.whole if mesh.model > 1 else TPU.half) * codes
        moments = {"codes": codes + gradient + kept * matrix}
        if mesh.data > 1:  # else the matmul that makes a gradient updates the weights at once
            moments["codes"] += matrix
            moments["update"] = gradient + (TPU.update + kept) * matrix
    moments = {name: held if held > vmem else 0 for name, held in moments.items()}
    if has_aux:
        moments["auxk"] = _auxk_on_tpu(sae, b, mesh, vmem)
    return {name: round(slots * held) for name, held in moments.items()}


def _auxk_on_tpu(sae: Any, b: int, mesh: MeshConfig, vmem: int) -> float:
    """Rows with and without b_dec; the search of ``_auxiliary``, of which VMEM may hold a half.

    So it may the encoder's weights in bfloat16.
    """
    n, _, matrix, row = _sizes(sae, b, mesh)
    search = _auxiliary(sae.aux_latents, b, n, mesh.model, "tpu") / 2
    others = search + TPU.weights / 2 * matrix
    return 2 * row + search + (others if others > vmem else 0)


def _stacked(sae: Any, b: int, mesh: MeshConfig, slots: int) -> dict[str, int]:
    """What one member holds, and what the others keep meanwhile."""
    sparse, found = is_sparse(sae), room(sae, mesh.model) > 0
    one = (_sparse if sparse else _dense)(sae, b, mesh)
    if not sparse and not found:
        return {name: slots * held for name, held in one.items()}
    _, _, matrix, row = _sizes(sae, b, mesh)
    matrices, rows = CPU.member if sparse else FOUND
    others = (slots - 1) * (matrices * matrix + rows * row)
    return {name: held + others for name, held in one.items()}


def _sparse(sae: Any, b: int, mesh: MeshConfig) -> dict[str, int]:
    n, k, matrix, row = _sizes(sae, b, mesh)
    spare = -n % GROUP
    by_groups = by_network(block_rows(b), n + spare, k)
    kept = (CPU.matrices if by_groups else CPU.fewer) * matrix + CPU.rows * row
    if by_groups and spare:  # the encoder, filled up
        kept += matrix
    if getattr(sae, "matmul_dtype", "float32") == "bfloat16":
        kept += (matrix + row) // 2  # what the encoder's matmul reads
    slots = 4 * 4 * b * k
    if narrow := n <= NARROW * k:  # a block of codes, or of their gradient
        kept += 4 * block_rows(b) * n
    if narrow or not sorted_at_once(b * k, n):  # a sum and its terms before they are added
        kept += matrix + row
    elif mesh.strategy == "fsdp":  # the scalars are of a part
        kept -= matrix
    scores = CPU.scores + (0 if by_groups else 1)
    moments = {"selection": kept + slots + scores * 4 * block_rows(b) * n}
    if getattr(sae, "aux_coefficient", 0):
        gathered = 2 * matrix if mesh.strategy == "fsdp" and mesh.model > 1 else 0
        auxiliary = _auxiliary_on_cpu(sae.aux_latents, b, n, mesh.model)
        moments["auxk"] = kept + slots + gathered + auxiliary
    if mesh.strategy == "tp" or mesh.model > 1:  # else the optimiser sees a small part of each
        moments["update"] = CPU.update * matrix + row
    return moments


def _auxiliary_on_cpu(k_aux: int, b: int, n: int, model: int) -> int:
    """A block's codes and their gradient, and the dead latents of a block of rows, where the search
    is by bisection: on one device.
    """
    if model > 1:
        return _auxiliary(k_aux, b, n, model, "cpu")
    return 4 * (2 * b * block(n, "cpu") + min(b, ROWS) * n)


def _auxiliary(k_aux: int, b: int, n: int, model: int, of: str) -> int:
    """A row's largest dead latents so far, a block's codes, both side by side: the search.

    Then all shards' largest, twice.
    """
    best, new = min(k_aux, n), block(n, of)
    search = best + new + (best + new)
    gathered = 2 * best * model if model > 1 else 0
    return 4 * b * max(search, gathered)


def _dense(sae: Any, b: int, mesh: MeshConfig) -> dict[str, int]:
    n, _, matrix, row = _sizes(sae, b, mesh)
    held, codes = PLAIN if _plain(sae) else CUT, 4 * b * n
    moments = {
        "codes": held.scores * codes + held.matrices * matrix + held.rows * row,
        "update": held.update * matrix + row,
    }
    more = MORE.get(type(sae).__name__, 0)
    moments["codes"] += (more + (1 if more and room(sae, mesh.model) else 0)) * codes
    moments["codes"] += (1 if room(sae, mesh.model) else 3) * (slots(sae).parts - 1) * row
    if getattr(sae, "aux_coefficient", 0):
        moments["codes"] += held.aux * matrix
        moments["update"] += held.update_aux * matrix
        # about half of the search finds room in what the codes have left
        moments["codes"] += _auxiliary(sae.aux_latents, b, n, mesh.model, "cpu") // 2
    else:
        if getattr(sae, "matmul_dtype", "float32") == "bfloat16":
            moments["codes"] += codes  # what two matmuls read
        moments["update"] += 0 if held is PLAIN else codes
    if mesh.strategy == "fsdp" and held is PLAIN:
        moments = {name: bytes_ + matrix for name, bytes_ in moments.items()}
    return moments


def _plain(sae: Any) -> bool:
    """Whether codes are a function of one affine encoder's scores, without cut or threshold."""
    trained = {name for name, s in sae.specs()["params"].items() if s.trainable}
    own = trained - {"W_enc", "W_dec", "b_enc", "b_dec"}
    return not (own or sae.frozen or hasattr(sae, "aux_latents"))


def _sizes(sae: Any, b: int, mesh: MeshConfig) -> tuple[int, int, int, int]:
    """(latents, active ones, bytes of an [n, d], bytes of a [b, d]) of one device's part."""
    n = sae.n // mesh.model
    width = (sae.d_in + sae.d_out) / 2
    return n, min(getattr(sae, "k", n), n), round(4 * n * width), round(4 * b * width)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
