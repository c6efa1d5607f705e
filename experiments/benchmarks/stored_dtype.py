"""What the dtype of stored rows does to the dictionaries trained on them.

    python experiments/benchmarks/stored_dtype.py
    python experiments/benchmarks/stored_dtype.py --massive

Activations of pocket-lm are harvested once, in float32, and written as stores of the same rows in
the same order: float32, bfloat16 and int8 (scales found on the first 16,384 rows, outlier channels
kept in bfloat16). The same dictionaries are trained on each with `saex train`, from the same seeds,
and evaluated on the same held-out rows in float32. A run that is finished is not run again.

No channel of pocket-lm is an outlier. ``--massive`` gives the rows three, of the kinds that larger
models have: two channels far from 0 in all rows, one that is huge in one row of 200. A store
without a place for outliers (``calibrate(max_outliers=0)``) is the control.
"""

import argparse
import itertools
import pathlib
import shutil
import statistics
from typing import Any

import numpy as np
from measure import where, write

from saex import loop
from saex.config import resolve
from saex.data import Column, Store, StoreWriter, calibrate
from saex.data.order import permutation
from saex.data.text import Stdlib
from saex.harvest import Harvest, harvest
from saex.models import PocketLM

HERE = pathlib.Path(__file__).resolve().parent
SITE = "blocks.1.resid_post"
SEGMENT = 65536
DTYPES = ("float32", "bfloat16", "int8")
CONTROL = "int8-without"  # a place for outliers
FAR, SPIKE = (7, 100), 180  # channels that --massive changes
DEVIATION = np.float32(6.0)  # of a channel of this site from its mean
SAES = {
    "topk": {"name": "topk", "d_in": 256, "n": 512, "k": 16},
    "relu": {"name": "relu", "d_in": 256, "n": 512, "l1": 0.02, "l1_warmup_steps": 25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--massive", action="store_true", help="rows with outlier channels")
    parser.add_argument("--dir", help="default: runs/stored-dtype-benchmark")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="default: results/stored_dtype")
    args = parser.parse_args()
    kind = "_massive" if args.massive else ""
    folder = pathlib.Path(args.dir or f"runs/stored-dtype-benchmark{kind}")
    plain, found = harvested(folder, args.rows, args.massive), []
    dtypes = (*DTYPES, CONTROL) if args.massive else DTYPES
    paths = {dtype: written(folder, plain, dtype) for dtype in dtypes}
    for sae, seed, dtype in itertools.product(SAES, range(args.seeds), dtypes):
        result = trained(folder, paths[dtype], sae, seed, args.steps)
        found.append({"dtype": dtype, "sae": sae, "seed": seed, **result})
        print(found[-1], flush=True)
    record = where() | {"rows": plain.rows, "steps": args.steps, "runs": found}
    record |= {"stores": {dtype: facts(path, plain) for dtype, path in paths.items()}}
    write(args.out or HERE / "results" / f"stored_dtype{kind}", record, table(record))
    print(table(record))


def harvested(folder: pathlib.Path, rows: int, changed: bool) -> Store:
    """Rows in the order of the text, and held-out rows; float32."""
    model, params = PocketLM(matmul="float32").load()
    cfg = Harvest(sites=(SITE,), rows=rows, heldout_rows=60_000, dtype="float32", shuffle=False)
    made = folder / "made" if changed else folder
    stores = [
        harvest(model, params, Stdlib(), split, made / name, cfg)
        for split, name in (("heldout", "heldout"), ("train", "plain"))
    ]
    if changed:
        stores = [massive(store, folder / store.path.name) for store in stores]
    return stores[1]


def massive(store: Store, path: pathlib.Path) -> Store:
    """The store with outlier channels, 50 and 100 times as far out as a channel's deviation."""
    with StoreWriter(path, store.columns, dict(store.meta)) as writer:
        for at in range(0, 0 if writer.complete else store.rows, SEGMENT):
            rows = {n: store.read(n, at, min(at + SEGMENT, store.rows)) for n in store.columns}
            x = rows[SITE] = rows[SITE].copy()
            x[:, FAR] += 50 * DEVIATION
            x[::200, SPIKE] += 100 * DEVIATION
            rows[SITE + ".norm"] = np.linalg.norm(x, axis=1)
            writer.append(rows)
            writer.commit({})
        writer.finish()
    return Store.open(path)


def written(folder: pathlib.Path, plain: Store, dtype: str) -> pathlib.Path:
    """The same rows in another dtype, shuffled within segments; beside them the held-out rows."""
    path = folder / f"{dtype}-segments"
    sample = plain.read(SITE, 0, 16_384)
    site = Column(plain.columns[SITE].shape, dtype if dtype in DTYPES else "float32")
    if dtype.startswith("int8"):
        site = calibrate(sample, max_outliers=0 if dtype == CONTROL else None)
    columns = {SITE: site, **dict.fromkeys(("document", "position"), Column((), "int32"))}
    with StoreWriter(path / "train", columns) as writer:
        while not writer.complete and writer.rows < plain.rows:
            at = writer.rows
            stop = min(at + SEGMENT, plain.rows)
            writer.append({name: plain.read(name, at, stop) for name in columns})
            writer.commit({}, shuffle=(0, at))
        writer.finish()
    if not (path / "heldout").exists():
        shutil.copytree(folder / "heldout", path / "heldout")
    return path


def trained(
    folder: pathlib.Path, store: pathlib.Path, sae: str, seed: int, steps: int
) -> dict[str, float]:
    """FVU and L0 on the held-out rows."""
    config = {
        "sae": SAES[sae], "site": SITE, "steps": steps, "seed": seed, "subject": None,
        "store": str(store), "stream": {"batch": 1024}, "optim": {"lr": 4e-3},
        "eval": {"rows": 30_000, "controls": False}, "report": {"enabled": False},
        "log": {"every": 100, "tensorboard": False}, "checkpoint": {"every": steps, "keep": 1},
    }  # fmt: skip
    result = loop.train(resolve(config), folder / "runs" / f"{store.name}-{sae}-{seed}")
    return {name: result[name] for name in ("fvu", "l0", "dead_fraction")}


def facts(path: pathlib.Path, plain: Store) -> dict[str, float]:
    """Bytes of a row of the site, how far it is from float32, and what int8 needs to say."""
    store = Store.open(path / "train")
    column, parts = store.columns[SITE], [c for n, c in store.columns.items() if SITE in n]
    exact, read, at = [], [], 0
    for segment in store.manifest.segments[:2]:
        rows = slice(at, at + segment.rows)
        exact.append(plain.read(SITE, rows.start, rows.stop)[permutation(segment.rows, 0, at)])
        read.append(store.read(SITE, rows.start, rows.stop).astype(np.float32))
        at += segment.rows
    x, error = np.concatenate(exact), np.concatenate(read) - np.concatenate(exact)
    return {
        "row_bytes": sum(c.row_bytes for c in parts),
        "fvu_of_storing": float((error**2).sum() / ((x - x.mean(0)) ** 2).sum()),
        "outliers": len(column.outliers),
        "clipped": store.stats[SITE].clipped,
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per dtype."""
    names = [(sae, key) for sae in SAES for key in ("fvu", "l0")]
    lines = [
        f"{record['machine']}; {record['date']}; `{record['command']}`. {record['rows']:,} rows of "
        f"{SITE} of pocket-lm, {record['steps']} steps of 1024 rows, n 512, mean ± standard "
        "deviation over seeds; held-out rows in float32.",
        "",
        "| stored as | bytes a row | FVU of storing | "
        + " | ".join(f"{sae} {key.upper()}" for sae, key in names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]  # fmt: skip
    for dtype, said in record["stores"].items():
        runs = [r for r in record["runs"] if r["dtype"] == dtype]
        cells = [told([r[key] for r in runs if r["sae"] == sae]) for sae, key in names]
        extra = f" ({said['outliers']:.0f} outliers)" if said["outliers"] else ""
        start = f"| {dtype}{extra} | {said['row_bytes']:.0f} | {said['fvu_of_storing']:.2g} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def told(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.5g} ± {spread:.2g}"


if __name__ == "__main__":
    main()
