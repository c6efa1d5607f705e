"""Which form of top-k is fastest on CPU, by width and k.

    python experiments/benchmarks/topk_cpu.py

``lax.top_k``; the same in two exact levels, by maxima of 16 neighbours; and the sorting network of
``saex/kernels/topk/cpu.py``, with groups of a given size, whatever it would choose itself, which is
the column "cpu". Milliseconds for 2M scores, minimum of interleaved runs in one process, float32;
latents are large with Zipf frequencies. Beside them the seconds that the network takes to compile,
and the cost model's floor on this machine: reading the scores once.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from measure import interleaved, machine, op_floor, where, write, zipf_scores

from saex.kernels.topk import cpu

HERE = pathlib.Path(__file__).resolve().parent
WIDTHS = (128, 512, 2048, 8192, 24576, 65536)
KS = (1, 4, 8, 16, 32, 64, 128, 256)
GROUPS = (8, 16, 32)
SCORES = 2**21
LAX, LEVELS, CPU = "lax", "lax, two levels", "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--ks", type=int, nargs="+", default=KS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", default=str(HERE / "results" / "topk_cpu"))
    args = parser.parse_args()
    found = []
    for n in args.widths:
        few = jnp.asarray(zipf_scores(min(SCORES // n, 512), n))
        scores = jnp.tile(few, (SCORES // n // len(few), 1))
        for k in args.ks:
            if k > n:
                continue
            forms = {LAX: one_level, CPU: cpu.top_k}
            if n // 16 >= k:
                forms[LEVELS] = two_levels
            forms |= {str(g): functools.partial(network, group=g) for g in GROUPS if n % g == 0}
            calls = {name: _compiled(form, scores, k) for name, form in forms.items()}
            seconds = _seconds_to_compile(scores, k)
            times = interleaved(calls, args.rounds)
            floor = round(op_floor(("top_k",), SCORES // n, 0, n, k), 3)
            row = {"n": n, "k": k, "floor": floor, "compiled in": seconds}
            found.append({**row, **{f: round(1e3 * s, 2) for f, s in times.items()}})
            print(found[-1], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record["constants"] = machine().describe()
    write(args.out, record, table(record))


def one_level(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """lax.top_k; the barriers keep it the TopK call whatever else is in the program."""
    values, indices = jax.lax.top_k(scores, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)


def two_levels(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k groups of contiguous entries with the largest maxima, then the k largest in them."""
    b, n = scores.shape
    grouped = scores.reshape(b, n // 16, 16)
    chosen = jnp.sort(one_level(grouped.max(axis=-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1).reshape(b, k * 16)
    values, slots = one_level(candidates, k)
    return values, jnp.take_along_axis(chosen, slots // 16, axis=1) * 16 + slots % 16


def network(scores: jax.Array, k: int, group: int) -> tuple[jax.Array, jax.Array]:
    """The backend where it would not choose the network too."""
    with mock.patch.multiple(cpu, GROUP=group, SCORES=1):
        return cpu.top_k(scores, k)


def _seconds_to_compile(scores: jax.Array, k: int) -> float:
    lowered = jax.jit(lambda s: cpu.top_k(s, k)).lower(scores)
    started = time.perf_counter()
    lowered.compile()
    return round(time.perf_counter() - started, 2)


def _compiled(f: Callable, scores: jax.Array, k: int) -> Callable[[], Any]:
    compiled = jax.jit(lambda s: f(s, k))
    return lambda: compiled(scores)


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per width and k; the fastest but the backend's own choice is bold."""
    forms = [LAX, LEVELS, *map(str, GROUPS), CPU]
    lines = [
        "# Forms of top-k on CPU",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds for {SCORES:,} "
        f"scores, minimum of {record['rounds']} interleaved runs. A number heads the column of the "
        "network with groups of so many entries; cpu is the backend with its own choice; "
        "heavy-tailed scores.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| n | k | "
        + " | ".join(forms)
        + " | lax / cpu | floor | cpu / floor | cpu, s to compile |",
        "|---" * (len(forms) + 6) + "|",
    ]
    for row in record["milliseconds"]:
        times = {f: row[f] for f in forms if f in row}
        best = min((f for f in times if f != CPU), key=times.__getitem__)
        cells = [f"**{times[f]}**" if f == best else f"{times.get(f, '')}" for f in forms]
        cells += [f"{times[LAX] / times[CPU]:.2f}", row["floor"]]
        cells += [f"{times[CPU] / row['floor']:.1f}", row["compiled in"]]
        lines.append(f"| {row['n']} | {row['k']} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
