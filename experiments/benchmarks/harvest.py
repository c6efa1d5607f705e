"""What writing costs a harvest, and how long training from a store waits for rows.

    python experiments/benchmarks/harvest.py

Writing: pocket-lm reads the standard library, as in the quickstart's harvest, in rounds of two: as
it is, with the time inside `StoreWriter` added up from outside (`append` takes rows into memory,
`commit` and `finish` shuffle, write and sync them), and with a writer that drops what it is given.
The first says how long the writer is at work, while the model computes the next batches in another
thread; the second, what a harvest would gain if writing were free, which is what writing costs.
Which of the two is first changes from round to round.

Waiting: `saex train` on random rows from a store, at the CPU shapes of `step_cpu.py`; the share of
the wall time that the loop waits for a batch, from `metrics.jsonl`, without the first quarter of
the steps (programs are compiled, the first windows are read).
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from measure import where, write
from store import written

import saex.harvest
from saex import loop
from saex.config import resolve
from saex.data import Stdlib, Store, StoreWriter
from saex.harvest import Harvest
from saex.models import PocketLM

HERE = pathlib.Path(__file__).resolve().parent
SITE = "blocks.1.resid_post"
GOALS = {"writing": 0.05, "waiting": 0.02}
WRITES = ("append", "commit", "finish")
SHAPES = {  # rows, d, n, k: those of step_cpu.py, which needs the peers
    "quickstart": (4096, 256, 2048, 32),
    "S1": (4096, 512, 8192, 32),
    "S2": (2048, 768, 24576, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/harvest-benchmark", help="removed afterwards")
    parser.add_argument("--rows", type=int, default=300_000, help="of the harvest")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="a minute, to see that it runs")
    parser.add_argument("--out", default=str(HERE / "results" / "harvest"))
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.rounds, args.steps = 20_000, 1, 8
        SHAPES.update({name: (256, d, 512, k) for name, (_, d, _, k) in SHAPES.items()})
    folder = pathlib.Path(args.dir)
    record = where() | {"jax": jax.__version__, "steps": args.steps}
    one_round(folder, min(args.rows, 20_000))  # libraries are loaded, files come into memory
    record["harvests"] = [one_round(folder, args.rows, i % 2 > 0) for i in range(args.rounds)]
    record["trainings"] = {s: waiting(folder, *SHAPES[s], args.steps) for s in args.shapes}
    write(args.out, record, table(record))
    print(table(record))


# ------------------------------------------------------------------------------------------ writing


def one_round(folder: pathlib.Path, rows: int, dropped_first: bool = False) -> dict[str, float]:
    """Seconds of a harvest that writes, of its writer's calls, and of one that drops its rows."""
    before = harvested(folder, rows, Dropping) if dropped_first else None
    with timed(StoreWriter, WRITES) as spent:
        writing = harvested(folder, rows)
    dropping = before or harvested(folder, rows, Dropping)
    found = {**writing, **{f"{k}_dropping": v for k, v in dropping.items() if v}, **spent}
    print({name: round(value, 2) for name, value in found.items()}, flush=True)
    return found


def harvested(folder: pathlib.Path, rows: int, writer: type = StoreWriter) -> dict[str, float]:
    """Seconds and processor seconds of a harvest from text to store, and its rows; the store is
    removed.
    """
    model, params = PocketLM().load()
    cfg = Harvest(sites=(SITE,), rows=rows)
    shutil.rmtree(folder / "harvest", ignore_errors=True)
    started, worked = time.perf_counter(), time.process_time()
    with (
        mock.patch.object(saex.harvest, "StoreWriter", writer),
        contextlib.suppress(Dropped),
    ):
        saex.harvest.harvest(model, params, Stdlib(), "train", folder / "harvest", cfg)
    spent = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - worked}
    count = 0 if writer is Dropping else Store.open(folder / "harvest").rows
    shutil.rmtree(folder / "harvest", ignore_errors=True)
    return {**spent, "rows": count}


@contextlib.contextmanager
def timed(owner: type, names: tuple[str, ...]) -> Iterator[Counter]:
    """Adds up the seconds inside these methods of a class; a call of one by another counts once."""
    spent, inside = Counter(dict.fromkeys(names, 0.0)), []
    plain = {name: getattr(owner, name) for name in names}

    def measured(name: str):
        def call(*args: Any, **options: Any) -> Any:
            if inside:
                return plain[name](*args, **options)
            inside.append(name)
            started = time.perf_counter()
            try:
                return plain[name](*args, **options)
            finally:
                spent[name] += time.perf_counter() - started
                inside.pop()

        return call

    for name in names:
        setattr(owner, name, measured(name))
    try:
        yield spent
    finally:
        for name, method in plain.items():
            setattr(owner, name, method)


class Dropped(Exception):
    """There is no store to open at the end."""


class Dropping:
    """A writer that forgets all it is given; as much of `StoreWriter` as a harvest calls."""

    def __init__(self, *args: Any, **options: Any):
        self.cursor, self.missing, self.complete, self.rows, self.buffered = {}, [], False, 0, 0

    def __enter__(self) -> "Dropping":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def append(self, rows: dict[str, Any]) -> None:
        """Counts the rows."""
        self.buffered += len(rows["tokens"])

    def commit(self, cursor: dict[str, Any], **options: Any) -> None:
        """Counts them as written."""
        self.rows, self.buffered = self.rows + self.buffered, 0

    def finish(self) -> None:
        """Ends the harvest, which would open the store."""
        raise Dropped


# ------------------------------------------------------------------------------------------ waiting


def waiting(
    folder: pathlib.Path, batch: int, d: int, n: int, k: int, steps: int
) -> dict[str, float]:
    """Seconds a step and the share of them in which the loop waits, after the first quarter."""
    rows = max(40 * batch, 20_000)  # a few windows, so that they are read in the measured steps too
    stores = folder / f"rows-{d}"
    written(stores / "train", rows, d)
    written(stores / "heldout", 4096, d)
    config = {
        "sae": {"name": "topk", "d_in": d, "n": n, "k": k}, "site": "x", "steps": steps,
        "subject": None, "store": str(stores), "stream": {"batch": batch},
        "eval": {"rows": 2048, "controls": False}, "report": {"enabled": False},
        "log": {"every": max(steps // 4, 1), "tensorboard": False},
        "checkpoint": {"every": steps, "keep": 1},
    }  # fmt: skip
    workdir = folder / f"train-{d}"
    shutil.rmtree(workdir, ignore_errors=True)
    loop.train(resolve(config), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = share([line for line in lines if "wait_share" in line], steps // 4)
    shutil.rmtree(workdir)
    shutil.rmtree(stores)
    print({"d": d, **found}, flush=True)
    return {"batch": batch, "d": d, "n": n, "k": k, **found}


def share(lines: list[dict[str, float]], after: int) -> dict[str, float]:
    """The mean of lines that each tell of the steps since the one before, weighted by time."""
    steps = [0, *(line["step"] for line in lines)]
    parts = [
        ((step - before) * line["step_seconds"], line["wait_share"], step - before)
        for before, step, line in zip(steps, steps[1:], lines)
        if before >= after
    ]
    seconds = sum(part[0] for part in parts)
    return {
        "step_seconds": seconds / sum(part[2] for part in parts),
        "wait_share": sum(part[0] * part[1] for part in parts) / seconds,
        "steps_measured": sum(part[2] for part in parts),
    }


# ---------------------------------------------------------------------------------------- the table


def table(record: dict[str, Any]) -> str:
    """Markdown: one table for the harvest and one for training."""
    runs = record["harvests"]

    def median(value: Any) -> str:
        values = sorted(value(r) for r in runs)
        return f"{statistics.median(values):.4g} | {values[0]:.4g}, {values[-1]:.4g}"

    def percent(value: Any) -> str:
        values = sorted(100 * value(r) for r in runs)
        return f"{statistics.median(values):.2f} % | {values[0]:.2f} %, {values[-1]:.2f} %"

    lines = [
        f"{record['machine']}; JAX {record['jax']}; {record['date']}; `{record['command']}`. "
        f"pocket-lm, {runs[0]['rows']:,} rows of {SITE}, bf16, {len(runs)} rounds.",
        "",
        "| harvest | median | least, most | goal |",
        "| --- | --- | --- | --- |",
        f"| rows a second | {median(lambda r: r['rows'] / r['seconds'])} | |",
        f"| seconds | {median(lambda r: r['seconds'])} | |",
        *(
            f"| share inside `{name}` | {percent(lambda r, name=name: r[name] / r['seconds'])} | |"
            for name in WRITES
        ),
        f"| share inside the writer | {percent(_writing)} | |",
        f"| gain if rows were dropped, wall time | {percent(lambda r: _gain(r, 'seconds'))} "
        f"| ≤ {GOALS['writing']:.0%} |",
        f"| gain if rows were dropped, processor time | {percent(lambda r: _gain(r, 'cpu'))} | |",
        "",
        "| training from a store: b, d, n, k | seconds a step | waiting for rows | goal | steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in record["trainings"].items():
        size = ", ".join(str(found[key]) for key in ("batch", "d", "n", "k"))
        lines.append(
            f"| {name}: {size} | {found['step_seconds']:.3f} | {found['wait_share']:.2%} "
            f"| ≤ {GOALS['waiting']:.0%} | {found['steps_measured']} |"
        )
    return "\n".join(lines) + "\n"


def _writing(run: dict[str, float]) -> float:
    """The share of a harvest's wall time inside the writer."""
    return sum(run[name] for name in WRITES) / run["seconds"]


def _gain(run: dict[str, float], which: str) -> float:
    """The share of a harvest's time, wall or processor, that it takes less without writing."""
    return 1 - run[f"{which}_dropping"] / run[which]


if __name__ == "__main__":
    main()
