"""The parts of ``gpu.py`` that are saex's: questions, ops, whole steps; each in its own process."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_questions
import jax
from gpu_clock import Clock, arguments, hand_on, sizes, told
from gpu_ops import OPS, TABLES, runs_here
from measure import saex_step, zipf_rows

from saex.sae import TopK

# what stands in for "gpu" in a whole step; the first is what saex does by itself
STEPS = {
    "XLA": (),
    "Hopper backward": ("backward",),
    "Hopper backward, decode": ("backward", "decode", "dots", "scatter"),
    "Hopper all": ("backward", "decode", "dots", "scatter", "encode"),
}
Found = Iterator[tuple[str, Any]]


def main() -> None:
    args = arguments(__doc__)
    clock, found = Clock(args.rounds, args.calls, jax.block_until_ready), {}
    with gpu_table_on_cpu():
        for name, value in PARTS[args.part](clock, sizes(args.shapes)):
            found[name] = value
            print(args.part, name, value, flush=True)
            hand_on(args.to, jax.devices()[0].device_kind, found)


def gpu_table_on_cpu() -> Any:
    """Without a GPU the GPU's backends are tried all the same (Hopper's are interpreted)."""
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for table in TABLES.values():
        stack.enter_context(swapped(table, "cpu", table["gpu"]))
    return stack


@contextlib.contextmanager
def swapped(table: dict, key: str, backend: Callable) -> Iterator[None]:
    """``table[key]`` is another backend for a while."""
    before, table[key] = table[key], backend
    jax.clear_caches()
    try:
        yield
    finally:
        table[key] = before
        jax.clear_caches()


# -------------------------------------------------------------------------------------------- ops


def ops(clock: Clock, shapes: dict) -> Found:
    """(shape, milliseconds of each op by backend)."""
    for shape, size in shapes.items():
        found = {}
        for op, make in OPS.items():
            try:
                found[op] = {name: clock(call) for name, call in make(*size).items()}
            except Exception as error:  # its arrays do not fit
                found[op] = {"all": told(error)}
        yield shape, found


# ------------------------------------------------------------------------------------------ steps


def steps(clock: Clock, shapes: dict) -> Found:
    """(shape, milliseconds of a whole step by what does it)."""
    for shape, (b, d, n, k) in shapes.items():
        sae = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16", aux_coefficient=0.0)
        times = {
            name: step_time(clock, sae, b, ops)
            for name, ops in STEPS.items()
            if all(runs_here(op, "pallas_gpu") for op in ops)
        }
        aux = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16")
        times["XLA, AuxK on, nothing dead"] = step_time(clock, aux, b, ())
        yield shape, times


def step_time(clock: Clock, sae: TopK, b: int, hopper: Sequence[str]) -> float | str:
    """Milliseconds of ``make_step``, with Hopper's kernels for the ops that are named."""
    key = "cpu" if jax.default_backend() == "cpu" else "gpu"
    with contextlib.ExitStack() as stack:
        for op in hopper:
            stack.enter_context(swapped(TABLES[op], key, TABLES[op]["pallas_gpu"]))
        jax.clear_caches()
        # the first state is made in there too: where it does not fit, this row alone is lost
        return clock.made(lambda: saex_step(zipf_rows(b, sae.d_in), sae))


def questions(clock: Clock, shapes: dict) -> Found:
    """(question, answer) of what could not be known without a GPU."""
    for name, ask in gpu_questions.ALL.items():
        try:
            yield name, ask(clock, "tiny" in shapes)
        except Exception as error:
            yield name, told(error)


PARTS = {"questions": questions, "ops": ops, "steps": steps}


if __name__ == "__main__":
    main()
