"""How the kernels in Pallas Mosaic GPU (Hopper) are launched. Imported by ``pallas_gpu.py`` only.

One warpgroup (128 threads) holds a row of the dictionary in registers, so rows are padded to
multiples of 128 entries: pick such widths, padding copies the array.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.kernels import target, varying_axes

LANES = 128  # threads of a warpgroup


def launch(
    body: Callable[..., None], out: Sequence[Any], grid: dict[str, int], operands: Sequence[Any]
) -> Any:
    """Run ``body(*operand refs, *out refs)`` for each point of the grid, one warpgroup a point.

    Args:
      out: of ``like``. grid: the sizes of the axes by name; ``jax.lax.axis_index`` tells where.

    On CPU the kernel is interpreted, with detection of races: slow, for tests.
    """
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=warpgroup_params(),
        interpret=interpreter(),
    )
    return vary(kernel(*operands), out)


def warpgroup_params(**options: Any) -> plgpu.CompilerParams:
    """Layouts are inferred (JAX 0.12's default, to be asked for in 0.10)."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **options)


def interpreter() -> Any:
    """The interpreter's parameters where the target is a CPU, else False."""
    if target() != "cpu":
        return False
    # not public yet in JAX 0.10 to 0.12
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def vary(arrays: Sequence[Array], out: Sequence[Any]) -> Any:
    """A kernel's results, varying over the mesh axes of ``out``: a kernel loses them."""

    def mark(a, wanted):
        axes = tuple(wanted.manual_axis_type.varying - varying_axes(a))
        return jax.lax.pcast(a, axes, to="varying") if axes else a

    return tuple(mark(a, wanted) for a, wanted in zip(arrays, out))


def pad(rows: Float[Array, "n d"]) -> Float[Array, "n D"]:
    """Rows with zeros up to the next multiple of ``LANES``."""
    short = -rows.shape[1] % LANES
    return jnp.pad(rows, ((0, 0), (0, short))) if short else rows
