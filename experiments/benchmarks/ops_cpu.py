"""The CPU backends of the ops, and the whole step, against plain jnp.

    python experiments/benchmarks/ops_cpu.py

"plain" is what one writes without saex: ``lax.top_k``, codes scattered into a dense [b, n] matrix,
dense matmuls, autodiff. "reference" is the definition in ``saex/kernels``, "cpu" what is used on
CPU. Milliseconds, minimum of interleaved runs in one process, float32, beside ``saex.cost``'s floor
on this machine. Rows, scores and latents are heavy-tailed (``measure.py``).
"""

import argparse
import pathlib
from typing import Any

import jax
from measure import interleaved, machine, op_floor, step_floor, where, write
from ops_cpu_calls import DEAD, ops

from saex.kernels.sparse_decode.cases import BENCHMARK
from saex.sae import TopK

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {**BENCHMARK, "tiny": (64, 32, 256, 4)}
FLOORS = {  # by op: the ops of the cost model that it is made of, if not the one of its name
    "top_k + decode": ("top_k", "decode"),
    "loss and gradients": ("encode", "decode", "backward"),
    "Adam, unit rows": ("adam",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(BENCHMARK), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", default=str(HERE / "results" / "ops_cpu"))
    parser.add_argument("--ops", nargs="+", help="of the table's names; all by default")
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.rounds, args.out = ["tiny"], 1, args.out + "_tiny"
    found = {}
    for shape in args.shapes:
        found[shape] = {}
        for op, calls in ops(*SHAPES[shape]).items():
            if args.ops and op not in args.ops:
                continue
            times = interleaved(calls(), args.rounds)
            found[shape][op] = {name: round(1e3 * s, 3) for name, s in times.items()}
            found[shape][op]["floor"] = round(floor(op, *SHAPES[shape]), 3)
            print(shape, op, found[shape][op], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record["constants"] = machine().describe()
    write(args.out, record, table(record))


def floor(op: str, b: int, d: int, n: int, k: int) -> float:
    """Milliseconds that the op takes here at least."""
    if op == "train step":
        return step_floor(TopK(d, n, k=k), b)
    if op == "AuxK":  # its latents, and the decode that its residual comes from
        return op_floor(("auxk",), b, d, n // DEAD, k) + op_floor(
            ("decode", "backward"), b, d, n, k
        )
    if op == "batch selection":
        return op_floor(("encode", "cut"), b, d, n, min(8 * k, n))
    if op == "threshold selection":
        return op_floor(("encode",), b, d, n, min(256, n))
    return op_floor(FLOORS.get(op, (op,)), b, d, n, k)


def table(record: dict[str, Any]) -> str:
    """Markdown: one row per shape and op."""
    lines = [
        "# Ops on CPU against plain jnp",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds, minimum of "
        f"{record['rounds']} interleaved runs; heavy-tailed rows and latents.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| shape | b, d, n, k | op | plain | reference | cpu | plain / cpu | floor | cpu / floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, by_op in record["milliseconds"].items():
        size = ", ".join(map(str, SHAPES[shape]))
        for op, ms in by_op.items():
            cells = [shape, size, op, ms["plain"], ms.get("reference", ""), ms["cpu"]]
            cells += [f"{ms['plain'] / ms['cpu']:.2f}", ms["floor"]]
            cells += [f"{ms['cpu'] / max(ms['floor'], 1e-3):.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
