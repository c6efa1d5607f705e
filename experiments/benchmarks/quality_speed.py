"""Milliseconds a step of every method that peers have too, at three widths.

    python experiments/benchmarks/quality_speed.py

``quality.py`` compares FVU at a width at which hundreds of runs fit into an hour, and where a dense
step costs little. What a step takes at widths that people train is this table: the same training
calls on rows whose features fire with Zipf frequencies, once with four steps and once with eight.
The difference is that of four steps, without what a library does before and after. Least times of
some rounds, after one that may compile. Settings are those with which the sweeps of ``quality.py``
start; nothing is dead.

saex's ReLU, Gated and JumpReLU are done densely until L0 has fallen, which these first steps do not
show: their runs of ``LONG`` steps are timed as well, as a mean and over the last ``LAST`` steps, on
several batches, at a penalty that leads to about the same L0. A peer's step does not depend on L0.

The environment is that of ``quality.py``.
"""

import argparse
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from measure import where, write, zipf_rows
from quality import Clock, study
from quality_libraries import LIBRARIES, METHODS, TRANSCODERS, Data, Settings, setting
from quality_saex import CLIP, dictionary

from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from saex.train.state import init_state
from saex.train.step import hyper_arrays, make_step

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {  # rows, d, n
    "quality": (1024, 256, 512),
    "quickstart": (4096, 256, 2048),
    "S1": (4096, 512, 8192),
    "tiny": (256, 32, 128),
}
L0 = 32
FEW, MORE = 4, 8  # steps of the two calls
# Times the penalty with which the sweeps start, for an L0 of about 32 at the end of the long runs.
FALLING = {"relu": 1.5, "gated": 0.7, "jump_relu": 4.0}
LONG, LAST, BATCHES, FASTER = 200, 40, 8, 2  # the long runs have the third of the rates


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
    falling = [m for m in args.only if m in FALLING]
    runs = {s: {m: long_run(m, *SHAPES[s]) for m in falling} for s in args.shapes}
    record = where() | {"l0": L0, "rounds": args.rounds, "milliseconds": found, "runs": runs}
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


def long_run(method: str, b: int, d: int, n: int) -> dict[str, float]:
    """Of saex: milliseconds a step of a run, of its last steps, and L0 at its end."""
    rows = zipf_rows(b * BATCHES, d).reshape(BATCHES, b, d)
    s = Settings(d, n, min(L0, n // 4), LONG, b, warmup=6, decay=LONG // 5, dead_after=2**30)
    sae = dictionary(method, s, FALLING[method] * setting(method, "saex", s.l0)[1])
    optim = Optim(lr=LIBRARIES["saex"].rates(method, n)[FASTER], clip=CLIP.get(method, 0.01))
    mesh, times = make_mesh(MeshConfig()), []
    with jax.set_mesh(mesh):
        init = optim.transformation(), jax.random.key(0), {"x": rows[0]}, mesh, "tp"
        state, hyper = init_state(sae, *init), hyper_arrays(sae, optim, LONG)
        step, place = make_step(sae, optim, LONG), jax.NamedSharding(mesh, jax.P("data"))
        for i in range(LONG):
            started = time.perf_counter()
            batch = {"x": jax.device_put(rows[i % BATCHES], place)}
            state, metrics = step(state, batch, jax.random.key(0), hyper)
            l0 = float(metrics["l0"])
            times.append(1e3 * (time.perf_counter() - started))
    mean, last = np.mean(times[1:]), np.median(times[-LAST:])  # the first compiles
    found = {"mean": round(float(mean), 1), "last": round(float(last), 1), "l0": round(l0, 1)}
    print((b, d, n), method, found, flush=True)
    return found


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
    lines += [
        "",
        f"Runs of {LONG} steps of saex, on {BATCHES} batches in turn: milliseconds a step of the "
        f"run, and of its last {LAST} steps; beside them the fastest peer's step.",
        "",
        "| b, d, n | method | run | its end | L0 then | best peer | best peer / run | / its end |",
        "|---" * 8 + "|",
    ]
    for shape, runs in record["runs"].items():
        for method, of in runs.items():
            times = record["milliseconds"][shape][method]
            best = min(ms for name, ms in times.items() if name != "saex")
            size = ", ".join(map(str, SHAPES[shape]))
            cells = f"{of['mean']:.0f} | {of['last']:.0f} | {of['l0']:.0f} | {best:.0f}"
            ratios = f"{best / of['mean']:.1f} | {best / of['last']:.1f}"
            lines.append(f"| {size} | {method} | {cells} | {ratios} |")
    return "\n".join([*lines, ""])


def _cell(ms: float | None, own: float) -> str:
    return "" if ms is None else f"{ms:.0f} ({ms / own:.1f})"


if __name__ == "__main__":
    main()
