"""What a training step costs: time at the roofline, bytes on the network, bytes in memory.

Arithmetic over shapes: nothing is compiled and no device is touched (but to measure a CPU, or to
learn which is here). The time is a floor that benchmarks divide by, not a forecast; ``ASSUMES``
says of what.
"""

import dataclasses
import functools
from typing import Any

from saex.cost import collectives, terms
from saex.cost.hardware import NAMES as NAMES
from saex.cost.hardware import Hardware
from saex.cost.hardware import hardware as hardware
from saex.cost.hardware import here as here
from saex.cost.memory import Memory as Memory
from saex.cost.memory import of_step as memory_of_step
from saex.cost.ops import OPS as OPS
from saex.cost.ops import of_op
from saex.cost.terms import ASSUMES as ASSUMES
from saex.cost.terms import Term
from saex.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Timed:
    """A term on a machine.

    Fields:
      term: what is done.
      seconds: the longest of its arithmetic, its memory traffic and its network traffic.
      bound: which of the three that is: "compute", "memory" or "network".
      times: how often a device does it in a step: once for each member that it holds.
    """

    term: Term
    seconds: float
    bound: str
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step on a machine: its terms, one after the other, on each device.

    Fields:
      terms: in the order of the step. rows: of the global batch. hardware: the machine.
      members: dictionaries that the step trains. places: how many of them work side by side.
      supply: rows a second that come at most, from store, subject or host link; None: any number.
    """

    terms: tuple[Timed, ...]
    rows: int
    hardware: Hardware
    members: int = 1
    places: int = 1
    supply: float | int | None = None

    @property
    def busy(self) -> float:
        """Seconds that a device works in a step: the sum of all terms."""
        return sum(t.times * t.seconds for t in self.terms)

    @property
    def seconds(self) -> float:
        """The floor: all terms, or, where that is longer, until the next rows are there."""
        return max(self.busy, self.rows / self.supply if self.supply else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Rows of the global batch a second; each of them trains every member."""
        return self.rows / self.seconds

    @property
    def gain(self) -> float:
        """Members as runs of their own, over this step: on the same devices, of the same supply.

        As many runs at a time as there are places, which then share the supply.
        """
        alone = dataclasses.replace(
            self,
            terms=tuple(dataclasses.replace(t, times=1) for t in self.terms),
            supply=self.supply / self.places if self.supply else None,
        )
        return self.members // self.places * alone.seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON: seconds, tokens a second, and the terms by name."""
        terms = {
            t.term.name: {
                **dataclasses.asdict(t.term),
                "seconds": t.seconds,
                "bound": t.bound,
                "times": t.times,
            }
            for t in self.terms
        }
        whole = {"seconds": self.seconds, "tokens_per_second": self.tokens_per_second}
        whole |= {"members": self.members, "gain": self.gain, "supply": self.supply}
        return {**whole, "hardware": self.hardware.name, "terms": terms}

    def __str__(self) -> str:
        """A table, a line per term."""
        row = "{:28} {:>12} {:>12} {:>12} {:>10}  {}".format
        lines = [row("term", "GFLOP", "MB", "sent MB", "ms", "bound by")]
        for t in self.terms:
            numbers = (t.term.flops / 1e9, t.term.bytes / 1e6, t.term.sent / 1e6, 1e3 * t.seconds)
            times = f", {t.times} times" if t.times > 1 else ""
            lines.append(row(t.term.name, *(f"{x:,.3f}" for x in numbers), t.bound + times))
        if self.supply:
            wait = f"{1e3 * self.rows / self.supply:,.3f}"
            lines.append(row("rows come", "", "", "", wait, f"{self.supply:,.0f} a second"))
        rate = f"{self.tokens_per_second:,.0f} tokens/s"
        if self.members > 1:
            rate += f", each for {self.members} members; {self.gain:.2f} times runs of their own"
        lines.append(row("a step", "", "", "", f"{1e3 * self.seconds:,.3f}", rate))
        return "\n".join(lines)


def step(
    sae: Any,
    batch: int,
    mesh: MeshConfig,
    hardware: Hardware,
    dead: int = 0,
    moments: str = "float32",
    members: int = 1,
    supply: float | int | None = None,
    active: float | int | None = None,
) -> Cost:
    """The floor of one training step.

    Args:
      sae: a dictionary: n, d_in, d_out, codes and specs(); k where its codes are sparse.
      batch: rows of the global batch.
      mesh: how rows and latents are split, and over how many places members are spread.
      hardware: what one device can do.
      dead: latents that AuxK computes, over all shards.
      moments: dtype of Adam's moments.
      members: of a stack: they share the batch, all else is each one's own.
      supply: rows a second that come at most; None: as many as are needed.
      active: latents a row that are not 0, where the method does not say how many.

    Raises:
      ValueError: members that the mesh's places do not divide.
    """
    if members % mesh.sweep:
        raise ValueError(f"members={members}: a multiple of mesh.sweep={mesh.sweep} is needed")
    dtype = getattr(sae, "matmul_dtype", "float32")
    timed = functools.partial(_timed, hardware=hardware, dtype=dtype)
    own = terms.of_step(sae, batch, mesh, dead, moments, active)
    own += [_exchange(c) for c in collectives.of_step(sae, batch, mesh, dead)]
    each = [timed(t, times=members // mesh.sweep) for t in own]
    every = (timed(terms.batch(sae, batch, mesh)), *each)
    return Cost(every, batch, hardware, members, mesh.sweep, supply)


def op(
    name: str, b: int, d: int, n: int, k: int, hardware: Hardware, dtype: str = "float32"
) -> float:
    """The floor of a single op in seconds: see ``saex.cost.ops``."""
    return sum(_timed(t, hardware, dtype).seconds for t in of_op(name, b, d, n, k, dtype))


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


def _timed(term: Term, hardware: Hardware, dtype: str, times: int = 1) -> Timed:
    seconds = {
        "compute": term.flops / hardware.flops[dtype],
        "memory": term.bytes / hardware.bandwidth,
        "network": term.sent / hardware.network,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Timed(term, seconds[bound], bound, times)
