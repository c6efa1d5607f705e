"""Is a dictionary trained on the stream as good as one trained on fully shuffled rows?

    python experiments/benchmarks/stream_quality.py

Activations of pocket-lm are harvested twice from the same contexts, as `saex harvest` does and with
the shuffle off. The same TopK is trained, from the same initial weights, on three orders of the
same rows: `stream`, the stream of the first store with its defaults; `all rows`, a permutation of
all rows in memory, another one each epoch; and a control, `not shuffled`, the second store by a
stream of one lane whose window is one chunk, so that contexts stay together. One numpy evaluator
scores the held-out rows. Steps, batch and learning rate are those of the quickstart, unless said
otherwise; the initial weights are taken from the same sample of rows.
"""

import argparse
import functools
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from measure import where, write
from quality_topk import evaluate
from topk_trainers import Settings, saex_topk

from saex.data import Stdlib, Store
from saex.data.mixing import expected_distinct
from saex.data.order import permutation
from saex.data.stream import Stream, cast
from saex.harvest import Harvest, harvest
from saex.models import PocketLM

HERE = pathlib.Path(__file__).resolve().parent
SITE = "blocks.1.resid_post"
ORDERS = ("stream", "all rows", "not shuffled")
GOAL = 0.005  # how far the stream's FVU may be from that of fully shuffled rows
SAMPLE_ROWS = 32_768
# A sample's, an epoch's draw: apart from those of streams, which take small numbers.
_SAMPLE, _EPOCH = 101, 102
Rows = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/stream-quality", help="for the stores, kept there")
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--heldout", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a minute, to see that it runs")
    parser.add_argument("--out", default=str(HERE / "results" / "stream_quality"))
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.heldout, args.steps, args.batch = 40_000, 4_000, 10, 1024
        args.n, args.seeds = 128, 1
    stores = harvested(pathlib.Path(args.dir), args.rows, args.heldout)
    runs = []
    for seed in range(args.seeds):
        orders = opened(stores, args.batch, seed)
        sample = drawn(orders["all rows"], seed)
        for order in ORDERS:
            runs.append({"order": order, "seed": seed, **trained(args, orders, order, sample)})
            print(runs[-1], flush=True)
        for order in orders.values():
            order.close()
    record = where() | {"jax": jax.__version__, "rows": stores["stream"].rows, "site": SITE}
    record |= {"heldout_rows": stores["heldout"].rows, "n": args.n, "batch": args.batch}
    record |= {"steps": args.steps, "runs": runs}
    write(args.out, record, table(record))
    print(table(record))


def harvested(folder: pathlib.Path, rows: int, heldout: int) -> dict[str, Store]:
    """The stores, made if they are not there; those of training hold the same rows."""
    model, params = PocketLM().load()
    stores = {}
    for name, split, shuffle in (
        ("stream", "train", True), ("not shuffled", "train", False), ("heldout", "heldout", False),
    ):  # fmt: skip
        cfg = Harvest(sites=(SITE,), rows=rows, heldout_rows=heldout, shuffle=shuffle)
        path = folder / f"{name.replace(' ', '-')}-{cfg.budget(split)}"
        stores[name] = harvest(model, params, Stdlib(), split, path, cfg)
    return stores


# ----------------------------------------------------------------------------------- orders of rows


class Permuted:
    """All rows that a stream takes of a store, in memory, in a random order each epoch."""

    def __init__(self, store: Store, positions: tuple[int, ...], batch: int, seed: int):
        kept = ~np.isin(store.read("position"), positions)
        self.x, self.documents = store.read(SITE)[kept], store.read("document")[kept]
        self.rows, self.batch, self.seed = len(self.x), batch, seed
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(self.rows, seed, epoch, _EPOCH)
        )

    def places(self, step: int) -> np.ndarray:
        """Of the rows of a batch."""
        found, at = [], step * self.batch
        while at < (step + 1) * self.batch:
            epoch, skip = divmod(at, self.rows)
            take = min(self.rows - skip, (step + 1) * self.batch - at)
            found.append(self._epoch(epoch)[skip : skip + take])
            at += take
        return np.concatenate(found)

    def gather(self, start: int, stop: int) -> dict[str, Rows]:
        """One batch, as `Batches.gather`."""
        places = self.places(start // self.batch)
        return {"x": self.x[places], "document": self.documents[places]}

    def close(self) -> None:
        """Nothing is open."""


def opened(stores: dict[str, Store], batch: int, seed: int) -> dict[str, Any]:
    """The three orders; they give the same number of rows an epoch."""
    columns = {"x": SITE, "document": "document"}
    plain = Stream(batch=batch)
    found = {
        "stream": plain.open(stores["stream"], columns, seed),
        "all rows": Permuted(stores["stream"], plain.exclude_positions, batch, seed),
        "not shuffled": Stream(batch=batch, window=1, lanes=1).open(
            stores["not shuffled"], columns, seed
        ),
    }
    assert len({order.rows for order in found.values()}) == 1, "the stores differ"
    return found


def drawn(order: Permuted, seed: int) -> Rows:
    """Rows drawn from all, for initial weights and the scale of the inputs; float32."""
    places = permutation(order.rows, seed, 0, _SAMPLE)[:SAMPLE_ROWS]
    return cast(order.x[places], np.dtype(np.float32))


# ------------------------------------------------------------------------------------------ one run


def trained(args: Any, orders: dict[str, Any], order: str, sample: Rows) -> dict[str, float]:
    """FVU and L0 on held-out rows, and how the order mixes."""
    settings = Settings(
        d=sample.shape[1], n=args.n, k=32, steps=args.steps, batch=args.batch, lr=4e-3,
        warmup=max(round(0.02 * args.steps), 1), decay=max(round(0.2 * args.steps), 1),
        dead_after=200_000,
    )  # fmt: skip
    scale = float(np.mean(np.sum(np.square(sample, dtype=np.float64), axis=1)) ** -0.5)
    rows, found = orders[order], []

    def batches(step: int) -> Rows:
        batch = rows.gather(step * args.batch, (step + 1) * args.batch)
        found.append(len(np.unique(batch["document"])))
        return cast(batch["x"], np.dtype(np.float32)) * np.float32(scale)

    seed = orders["all rows"].seed
    weights = saex_topk(settings, batches, sample * np.float32(scale), seed).weights
    scores = evaluate(weights, scale, heldout_rows(args), settings.k)
    random = expected_distinct(orders["all rows"].documents, args.batch)
    return {
        **{name: float(scores[name]) for name in ("fvu", "l0", "dead")},
        "documents": statistics.mean(found),
        "documents_at_random": random,
    }


def heldout_rows(args: Any, batch: int = 4096) -> Iterator[Rows]:
    """Held-out rows float32 [<= batch, d] in raw units, without the positions not trained on."""
    store = Store.open(pathlib.Path(args.dir) / f"heldout-{args.heldout}")
    for start in range(0, store.rows, batch):
        stop = min(start + batch, store.rows)
        kept = ~np.isin(store.read("position", start, stop), Stream().exclude_positions)
        yield cast(store.read(SITE, start, stop), np.dtype(np.float32))[kept]


# ---------------------------------------------------------------------------------------- the table


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per order, with its FVU against that of fully shuffled rows."""
    runs = record["runs"]

    def values(order: str, key: str) -> list[float]:
        return [r[key] for r in runs if r["order"] == order]

    base = statistics.mean(values("all rows", "fvu"))
    lines = [
        f"{record['machine']}; JAX {record['jax']}; {record['date']}; `{record['command']}`. "
        f"{record['rows']:,} rows of {record['site']} of pocket-lm, TopK with n {record['n']}, k 32"
        f", {record['steps']} steps of {record['batch']} rows, scored on "
        f"{record['heldout_rows']:,} held-out rows; FVU is mean ± standard deviation over seeds.",
        "",
        "| order of rows | seeds | FVU | per seed | against all rows | goal | dead "
        "| documents a batch (drawn at random) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    goals = {"stream": f"within {100 * GOAL} %", "not shuffled": "visibly worse"}
    for order in ORDERS:
        fvu = values(order, "fvu")
        spread = statistics.stdev(fvu) if len(fvu) > 1 else float("nan")
        documents = statistics.mean(values(order, "documents"))
        random = statistics.mean(values(order, "documents_at_random"))
        lines.append(
            f"| {order} | {len(fvu)} | {statistics.mean(fvu):.5f} ± {spread:.5f} "
            f"| {' '.join(f'{v:.5f}' for v in fvu)} "
            f"| {100 * (statistics.mean(fvu) / base - 1):+.2f} % | {goals.get(order, '')} "
            f"| {100 * statistics.mean(values(order, 'dead')):.2f} % "
            f"| {documents:.0f} ({random:.0f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
