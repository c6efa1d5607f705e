"""How well do batches mix in large stores of long contexts, with everything at its default?

    python experiments/benchmarks/stream_mixing.py

Writes the document number of each row as a harvest does (contexts one after the other, rows
shuffled within a segment), opens the stream at its defaults and prints in how many percent of the
documents of a random batch a batch has rows. No activations are needed for that, so a store of 100
million rows takes 400 MB.
"""

import argparse
import pathlib
import tempfile

import numpy as np
from measure import where, write

from saex.data import Column, Store, StoreWriter
from saex.data.stream import Stream
from saex.harvest import Harvest

HERE = pathlib.Path(__file__).resolve().parent
ROWS = (1_000_000, 5_000_000, 20_000_000, 100_000_000)
CONTEXTS = (128, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--out", default=str(HERE / "results" / "stream_mixing"))
    args = parser.parse_args()
    found = []
    for rows in args.rows:
        for context in args.contexts:
            with tempfile.TemporaryDirectory() as folder:
                found.append({"rows": rows, "context": context, **mixed(folder, rows, context)})
            print(found[-1], flush=True)
    record = where() | {"batch": Stream().batch, "runs": found}
    write(args.out, record, table(record))
    print(table(record))


def mixed(folder: str, rows: int, context: int) -> dict[str, float]:
    """Documents of a batch and of a random one."""
    cfg = Harvest()
    with StoreWriter(
        folder, {"document": Column((), "int32")}, {}, chunk_rows=cfg.chunk_rows
    ) as writer:
        for start in range(0, rows, cfg.segment_rows):
            row = np.arange(start, min(start + cfg.segment_rows, rows))
            writer.append({"document": (row // context).astype(np.int32)})
            writer.commit({}, shuffle=(start,))
        writer.finish()
    batches = Stream().open(Store.open(folder), ["document"], 0)
    told = batches.mixing(16)
    batches.close()
    return told


def table(record: dict) -> str:
    contexts = sorted({run["context"] for run in record["runs"]})
    lines = [
        f"{record['machine']}; {record['date']}; `{record['command']}`. Documents in a batch of "
        f"{record['batch']} rows (mean of 16), in percent of what a random draw from all rows has; "
        "stream and harvest at their defaults.",
        "",
        "| rows | " + " | ".join(f"contexts of {context}" for context in contexts) + " |",
        "| --- |" + " --- |" * len(contexts),
    ]
    for rows in sorted({run["rows"] for run in record["runs"]}):
        cells = []
        for context in contexts:
            (run,) = (r for r in record["runs"] if (r["rows"], r["context"]) == (rows, context))
            share = run["documents_per_batch"] / run["documents_per_random_batch"]
            cells.append(f"{100 * share:.1f}")
        lines.append(f"| {rows:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
