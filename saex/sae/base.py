"""What a dictionary is: a frozen dataclass of hyper-parameters and pure functions.

It owns no arrays. ``specs`` says every array's shape, logical axes and dtype once; shardings,
restore targets, memory estimates and tests derive from it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import flax.struct
import jax

from saex.typing import Batch, Leaf, Params


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array: its shape, a logical axis (or None) per dimension, its dtype and its meaning.

    ``trainable=False`` marks what inference reads but the optimiser must not see: normalisation
    constants, thresholds.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str = "float32"
    trainable: bool = True
    doc: str = ""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


class SparseCodes(flax.struct.PyTreeNode):
    """At most k latents a row. An unused slot holds value 0 and index 0; order is not promised.

    values: float32 [b, k]; a latent fired where its value is not 0.
    indices: int32 [b, k], in 0..n-1; no latent stands twice in a row's used slots.
    """

    values: Leaf
    indices: Leaf

    AXES: ClassVar = (("b", None), ("b", None))

    def dense(self, n: int) -> jax.Array:
        """The codes as [b, n]."""
        rows = jax.numpy.arange(self.values.shape[0])[:, None]
        zeros = jax.numpy.zeros((self.values.shape[0], n), self.values.dtype)
        return zeros.at[rows, self.indices].add(self.values)


class DenseCodes(flax.struct.PyTreeNode):
    """values: float32 [b, n], for methods without a bound on active latents per row."""

    values: Leaf

    AXES: ClassVar = (("b", "n"),)

    def dense(self, n: int) -> jax.Array:
        """The codes as [b, n]."""
        return self.values


class RaggedCodes(flax.struct.PyTreeNode):
    """As many latents of a row as it needs, in lines of a few slots; inside of a loss only.

    values: float32 [v, s]; indices: int32 [v, s]; both as ``SparseCodes``, line by line.
    groups: int32 [v], row * levels + level of each line, in rising order; b * levels: nobody's.
    b: how many rows there are. levels: of what is reconstructed apart (``nested``).
    """

    values: Leaf
    indices: Leaf
    groups: Leaf
    b: int = flax.struct.field(pytree_node=False)
    levels: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def rows(self) -> Leaf:
        """int32 [v], whose row each line is; b: nobody's."""
        return self.groups // self.levels


Codes = SparseCodes | DenseCodes
LossCodes = SparseCodes | DenseCodes | RaggedCodes


def mapped(fn: Callable, *codes: Any) -> Any:
    """The first codes with the values that ``fn`` makes of all of them."""
    return codes[0].replace(values=fn(*codes))


class Out(flax.struct.PyTreeNode):
    """What a loss returns beside its value.

    metrics: scalars by name, equal on every device.
    stats: the new stats.
    reconstruction: float32 [b, d_out] in the space the loss is taken in.
    frozen: new values of the params named by the dictionary's ``frozen`` (thresholds and the like).
    """

    metrics: Leaf
    stats: Leaf
    reconstruction: Leaf
    frozen: Leaf = flax.struct.field(default_factory=dict)


class Dictionary(Protocol):
    """The protocol of a method; ``docs/add-a-dictionary.md`` walks through one.

    ``encode``, ``decode`` and ``loss`` are written for one device's part (``ops.py`` maps them over
    the mesh) and decorated with ``ops.encode``, ``ops.decode`` and ``ops.loss``.
    """

    @property
    def d_in(self) -> int:
        """Width of an input row."""
        ...

    @property
    def d_out(self) -> int:
        """Width of a reconstruction; d_in, but for transcoders."""
        ...

    @property
    def n(self) -> int:
        """Number of latents."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``loss`` reads from a batch; "x" is the site."""
        ...

    @property
    def codes(self) -> type:
        """SparseCodes or DenseCodes: what ``encode`` returns."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Params that ``loss`` sets anew in each step (``Out.frozen``); not trainable."""
        ...

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Trainable matrices whose rows have norm 1 from ``init`` on, and keep it."""
        ...

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """{"params": name -> ArraySpec, "stats": name -> ArraySpec}."""
        ...

    def hyper(self) -> dict[str, float]:
        """Scalars that members of a sweep may vary; they reach ``loss`` as traced arrays."""
        ...

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """(params, stats) from a key and a sample batch of raw rows (means, medians, norms)."""
        ...

    def encode(self, params: Params, x: Any) -> Codes:
        """Codes of raw rows [b, d_in]: per row, deterministic, reading nothing but params."""
        ...

    def decode(self, params: Params, codes: Codes, context: Any = None) -> Any:
        """Raw rows [b, d_out]; ``context``: the inputs, where a skip path or a scale reads them."""
        ...

    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """(scalar, Out) of one global batch.

        ``hyper`` holds ``hyper()`` and "steps", the length of the run, as traced scalars. What is
        drawn from ``key`` must be a function of global rows and latents, equal on every mesh.
        """
        ...

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """All that is not a gradient: bias rules, resampling, what is made of others; global.

        What it makes of trainable params is not checked to be finite before the next step.
        """
        ...


def column_widths(sae: Any) -> dict[str, int]:
    """How many numbers a row of each column has that the method reads.

    x and gradient have d_in, y has d_out, any other one. A method for which that is not so has a
    property of this name, which says it for the columns concerned.
    """
    usual = {"x": sae.d_in, "gradient": sae.d_in, "y": sae.d_out}
    usual |= getattr(sae, "column_widths", {})
    return {name: usual.get(name, 1) for name in sae.columns}


def split(params: Params, specs: dict[str, ArraySpec]) -> tuple[Params, Params]:
    """(trainable, frozen) parts of params."""
    trainable = {k: v for k, v in params.items() if specs[k].trainable}
    return trainable, {k: v for k, v in params.items() if not specs[k].trainable}
