"""What a training step costs: time at the roofline, bytes on the network, bytes in memory.

Arithmetic over shapes: nothing is compiled and no device is touched (but to measure a CPU, or to
learn which is here). The time is a floor that benchmarks divide by, not a forecast; ``ASSUMES``
says of what.
"""

import dataclasses
from typing import Any

from saex.cost import collectives
from saex.cost.hardware import NAMES as NAMES
from saex.cost.hardware import Hardware
from saex.cost.hardware import hardware as hardware
from saex.cost.hardware import here as here
from saex.cost.memory import Memory as Memory
from saex.cost.memory import of_step as memory_of_step
from saex.cost.terms import ASSUMES as ASSUMES
from saex.cost.terms import Term, of_step
from saex.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Timed:
    """A term on a machine.

    Fields:
      term: what is done.
      seconds: the longest of its arithmetic, its memory traffic and its network traffic.
      bound: which of the three that is: "compute", "memory" or "network".
    """

    term: Term
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step on a machine: its terms, one after the other, on each device.

    Fields:
      terms: in the order of the step. rows: of the global batch. hardware: the machine.
    """

    terms: tuple[Timed, ...]
    rows: int
    hardware: Hardware

    @property
    def seconds(self) -> float:
        """The floor: the sum of all terms."""
        return sum(t.seconds for t in self.terms)

    @property
    def tokens_per_second(self) -> float:
        """Rows of the global batch a second."""
        return self.rows / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, tokens a second, and the terms by name."""
        terms = {
            t.term.name: {**dataclasses.asdict(t.term), "seconds": t.seconds, "bound": t.bound}
            for t in self.terms
        }
        whole = {"seconds": self.seconds, "tokens_per_second": self.tokens_per_second}
        return {**whole, "hardware": self.hardware.name, "terms": terms}

    def __str__(self) -> str:
        """A table, a line per term."""
        row = "{:28} {:>12} {:>12} {:>12} {:>10}  {}".format
        lines = [row("term", "GFLOP", "MB", "sent MB", "ms", "bound by")]
        for t in self.terms:
            numbers = (t.term.flops / 1e9, t.term.bytes / 1e6, t.term.sent / 1e6, 1e3 * t.seconds)
            lines.append(row(t.term.name, *(f"{x:,.3f}" for x in numbers), t.bound))
        rate = f"{self.tokens_per_second:,.0f} tokens/s"
        lines.append(row("a step", "", "", "", f"{1e3 * self.seconds:,.3f}", rate))
        return "\n".join(lines)


def step(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    hardware: Hardware,
    dead: int = 0,
    moments: str = "float32",
) -> Cost:
    """The floor of one training step.

    Args:
      sae: a dictionary: n, d_in, d_out, codes and specs(); k where its codes are sparse.
      batch: rows of the global batch.
      mesh: how rows and latents are split.
      hardware: what one device can do.
      dead: latents that AuxK computes, over all shards.
      moments: dtype of Adam's moments.
    """
    terms = of_step(sae, batch, mesh, dead, moments)
    terms += [_exchange(c) for c in collectives.of_step(sae, batch, mesh, dead)]
    dtype = getattr(sae, "matmul_dtype", "float32")
    return Cost(tuple(_timed(t, hardware, dtype) for t in terms), batch, hardware)


def memory(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    dtype: str = "bfloat16",
    moments: str = "float32",
    members: int = 1,
    hardware: str | None = None,
) -> Memory:
    """What one device holds during a training step: see ``saex.cost.memory``.

    Args:
      sae: a dictionary. batch: rows of the global batch, of ``dtype``. mesh: how both are split.
      moments: dtype of Adam's moments. members: of a stack.
      hardware: a name from ``NAMES``; None: the TPU that JAX has here, else the CPU. GPUs get the
        CPU's numbers.

    Raises:
      ValueError: an unknown name.
    """
    hardware = here() if hardware is None else hardware
    if hardware not in NAMES:
        raise ValueError(f"hardware={hardware!r}: choose from {', '.join(NAMES)}")
    return memory_of_step(sae, batch, mesh, dtype, moments, members, hardware)


def _exchange(c: collectives.Collective) -> Term:
    return Term(f"{c.name} ({c.axis})", 0.0, 2.0 * c.payload, c.sent)


def _timed(term: Term, hardware: Hardware, dtype: str) -> Timed:
    seconds = {
        "compute": term.flops / hardware.flops[dtype],
        "memory": term.bytes / hardware.bandwidth,
        "network": term.sent / hardware.network,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Timed(term, seconds[bound], bound)
