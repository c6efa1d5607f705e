"""Milliseconds a step of every method that peers have too, at three widths.

    python experiments/benchmarks/quality_speed.py

``quality.py`` compares FVU at a width at which hundreds of runs fit into an hour, and where a dense
step costs little. What a step takes at widths that people train is this table: the same training
calls on rows whose features fire with Zipf frequencies, once with four steps and once with eight.
The difference is that of four steps, without what a library does before and after. Least times of
some rounds, after one that may compile. Settings are those with which the sweeps of ``quality.py``
start; nothing is dead.

The environment is that of ``quality.py``.
"""

import argparse
import os
import pathlib
from typing import Any

import numpy as np
from measure import where, write, zipf_rows
from quality import Clock, study
from quality_libraries import LIBRARIES, METHODS, TRANSCODERS, Data, Settings, setting

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {  # rows, d, n
    "quality": (1024, 256, 512),
    "quickstart": (4096, 256, 2048),
    "S1": (4096, 512, 8192),
    "tiny": (256, 32, 128),
}
L0 = 32
FEW, MORE = 4, 8  # steps of the two calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["quality", "quickstart", "S1"])
    parser.add_argument("--only", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default=str(HERE / "results" / "quality_speed"))
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # SAELens' bars
    study.compile_once()
    found: dict[str, dict[str, dict[str, float]]] = {s: {} for s in args.shapes}
    for shape in args.shapes:
        rows = rows_of(*SHAPES[shape][:2])
        for method in args.only:
            having = [name for name, library in LIBRARIES.items() if method in library.methods]
            times = {name: {FEW: float("inf"), MORE: float("inf")} for name in having}
            for i in range(args.rounds + 1):
                for name, of in times.items():
                    for steps in of:
                        s = seconds(method, name, rows, *SHAPES[shape], steps)
                        of[steps] = min(of[steps], s) if i else of[steps]
            found[shape][method] = {
                name: round(1e3 * (of[MORE] - of[FEW]) / (MORE - FEW), 2)
                for name, of in times.items()
            }
            print(shape, method, found[shape][method], flush=True)
    record = where() | {"l0": L0, "rounds": args.rounds, "milliseconds": found}
    record["versions"] = sorted({library.version() for library in LIBRARIES.values()})
    write(args.out, record, table(record))


def rows_of(b: int, d: int) -> dict[str, np.ndarray]:
    """A batch: x, and y of a transcoder, which is a turn of x."""
    x = zipf_rows(b, d)
    return {"x": x, "y": np.ascontiguousarray(x[:, ::-1])}


def seconds(
    method: str, name: str, rows: dict[str, np.ndarray], b: int, d: int, n: int, steps: int
) -> float:
    """Of a training of so many steps, from the first batch on to the end of the last step."""
    if method not in TRANSCODERS:
        rows = {"x": rows["x"]}
    clock, scales = Clock(), dict.fromkeys(rows, 1.0)  # rows come with a mean squared norm of 1
    data = Data(clock.around(lambda step: rows), rows, scales, clock.stop)
    s = Settings(d, n, min(L0, n // 4), steps, b, warmup=1, decay=1, dead_after=2**30)
    library = LIBRARIES[name]
    library.train(method, s, data, setting(method, name, s.l0)[1], library.rates(method, n)[0], 0)
    return clock.end - clock.times[0]


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per shape and method; how many times saex's each takes."""
    names = list(LIBRARIES)
    lines = [
        "# A training step of every method, beside the peers",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}; {', '.join(record['versions'])}.  ",
        f"Milliseconds, the least of {record['rounds']} rounds, and in brackets how many times "
        f"saex's; default malloc, torch's Adam as the library has it, L0 {record['l0']}.",
        "",
        "| b, d, n | method | " + " | ".join(names) + " | best peer / saex |",
        "|---" * (len(names) + 3) + "|",
    ]
    for shape, methods in record["milliseconds"].items():
        for method, times in methods.items():
            own = times["saex"]
            cells = [_cell(times.get(name), own) for name in names]
            best = min(ms for name, ms in times.items() if name != "saex") / own
            size = ", ".join(map(str, SHAPES[shape]))
            lines.append(f"| {size} | {method} | {' | '.join(cells)} | {best:.1f} |")
    return "\n".join([*lines, ""])


def _cell(ms: float | None, own: float) -> str:
    return "" if ms is None else f"{ms:.0f} ({ms / own:.1f})"


if __name__ == "__main__":
    main()
