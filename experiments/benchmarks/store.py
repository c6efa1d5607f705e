"""How fast shuffled batches come from a store, against plain reads of the same bytes.

    python experiments/benchmarks/store.py --dir /disk/with/room
    python experiments/benchmarks/store.py --first --rows 10000000    # 15.4 GB

A store of random rows is written (bfloat16, width 768, chunks and segments as a harvest's), then
read, interleaved in one process: the files from one end to the other (`read`, into one buffer),
its chunks in random order by `preadv` into reused buffers (the most that any reader can do), and
the stream: shuffled batches in numpy with checksums off and on, and as JAX arrays with a thread.
"cold" drops the files' pages before each pass (posix_fadvise), so the disk is what is measured;
"warm" reads pages that are in memory. Each cell is the median over rounds of bytes per second; the
ratios are of the same round, and their spread is printed too. What the stream takes of memory is
measured in a process of its own.

``--first``: only how long it takes from the path of a store to the first batch, at places all over
three epochs, again with the pages dropped and in memory.
"""

import argparse
import multiprocessing
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from measure import where, write

from saex.data import Column, Store, StoreWriter
from saex.data.stream import Stream
from saex.harvest import Harvest

HERE = pathlib.Path(__file__).resolve().parent
BASE = {"cold": "cold sequential read", "warm": "warm preadv, random chunks"}
GOALS = {"cold stream": 0.8, "warm stream": 0.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/store-benchmark")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="time the first batch only")
    parser.add_argument("--keep", action="store_true", help="leave the store for the next time")
    parser.add_argument("--out", help="default: results/store, or results/store_first")
    args = parser.parse_args()
    out = pathlib.Path(args.out or HERE / "results" / ("store_first" if args.first else "store"))
    store = written(pathlib.Path(args.dir), args.rows, args.width)
    if args.first:
        seconds = first(store, args.rounds)
        save(out, where() | {"rows": store.rows, "width": args.width, "seconds": seconds})
        return
    readers = ways(store, args.batch)
    one_round(store, readers)  # memory is touched for the first time, programs are compiled
    rounds = [one_round(store, readers) for _ in range(args.rounds)]
    record = where() | {
        "rows": store.rows,
        "bytes": total_bytes(store),
        "width": args.width,
        "batch": args.batch,
        "memory": alone(memory, store.path, args.batch),
        "bytes_per_second": rounds,
    }
    save(out, record)
    if not args.keep:
        shutil.rmtree(args.dir)


def save(out: pathlib.Path, record: dict[str, Any]) -> None:
    """JSON with everything and the table."""
    text = (first_table if "seconds" in record else table)(record)
    write(out, record, text)
    print(text)


def first(store: Store, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of wall time from the path to the first batch: cold and warm, [round][place]."""
    steps = np.linspace(0, 3 * store.rows // 4096, 8, dtype=int).tolist()
    first_batch(store.path, 0)  # programs and threads
    found: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        cold, warm = [], []
        for step in steps:
            drop_pages(store)
            cold.append(first_batch(store.path, step))
            warm.append(first_batch(store.path, step))
        found["cold"].append(cold)
        found["warm"].append(warm)
    return found


def first_batch(path: pathlib.Path, step: int) -> float:
    started = time.perf_counter()
    batches = Stream().open(Store.open(path), ["x"], seed=0)
    iterator = batches.iterate(step)
    jax.block_until_ready(next(iterator))
    seconds = time.perf_counter() - started
    iterator.close()
    batches.close()
    return seconds


def first_table(record: dict[str, Any]) -> str:
    """Markdown: of the places' medians over rounds the least, the median and the most."""
    rounds = len(record["seconds"]["cold"])
    lines = [
        f"{record['machine']}; JAX {jax.__version__}; {record['date']}; `{record['command']}`. "
        f"{record['rows']:,} rows of {record['width']} bf16: from the path to the first batch of "
        f"4096 rows, at eight places in three epochs, the median of {rounds} rounds at each.",
        "",
        "| pages | the quickest place | median | the slowest place | the slowest of all | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for state, seconds in record["seconds"].items():
        places = [statistics.median(at) for at in zip(*seconds)]
        times = (min(places), statistics.median(places), max(places), max(map(max, seconds)))
        lines.append(f"| {state} | " + " | ".join(f"{t:.2f} s" for t in times) + " | ≤ 1 s |")
    return "\n".join(lines) + "\n"


def written(path: pathlib.Path, rows: int, width: int) -> Store:
    """The store, made if it is not there: rows of normal noise, by a block that is written over."""
    rng = np.random.default_rng(0)
    size = Harvest().segment_rows
    block = rng.standard_normal((size, width), np.float32).astype(ml_dtypes.bfloat16)
    columns = {
        "x": Column((width,)),
        **dict.fromkeys(("document", "position"), Column((), "int32")),
    }
    with StoreWriter(path, columns, {"rows": rows}) as writer:
        while not writer.complete and writer.rows < rows:
            n = np.arange(writer.rows, min(writer.rows + size, rows))
            writer.append({"x": block[: len(n)], "document": n // 1024, "position": n % 1024})
            writer.commit({}, shuffle=(int(n[0]),))
        writer.finish()
    os.sync()
    return Store.open(path)


def one_round(store: Store, readers: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Bytes per second of every way to read, once cold and once warm."""
    found = {}
    for state in ("cold", "warm"):
        for name, call in readers.items():
            if state == "cold":
                drop_pages(store)
            started = time.perf_counter()
            size = call()
            found[f"{state} {name}"] = size / (time.perf_counter() - started)
    return found


def ways(store: Store, batch: int) -> dict[str, Callable[[], int]]:
    """Each reads the whole store once and returns its bytes; streams go on with their next epoch,
    so a window is read ahead before each pass and one is at its end.
    """
    return {
        "sequential read": lambda: read_files(store),
        "preadv, random chunks": lambda: read_chunks(store),
        "stream": in_numpy(opened(store, batch), batch),
        "stream, checksums": in_numpy(opened(store, batch, checksums=True), batch),
        "stream to jax, 1 thread": in_jax(opened(store, batch), batch),
    }


def files(store: Store, names: Sequence[str] = ("x",)) -> Iterator[pathlib.Path]:
    for segment in store.manifest.segments:
        for name in names:
            yield store.path / segment.path / name / store.columns[name].shard


def drop_pages(store: Store) -> None:
    for file in files(store, list(store.columns)):
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(store: Store) -> int:
    """All files from their beginnings to their ends, 8 MB at a time into the same memory."""
    buffer, size = bytearray(2**23), 0
    for file in files(store):
        with open(file, "rb", buffering=0) as handle:
            while got := handle.readinto(buffer):
                size += got
    return size


def read_chunks(store: Store) -> int:
    """All chunks in random order by preadv into the same memory; no CRC, no index, no shuffle."""
    size = store.chunk_rows * store.columns["x"].row_bytes
    handles = [os.open(f, os.O_RDONLY) for f in files(store)]
    places = [
        (fd, at)
        for fd in handles
        for at in range(0, os.fstat(fd).st_size - size, size + 4)
    ]  # fmt: skip
    buffers = [memoryview(bytearray(size)) for _ in range(8)]
    order = np.random.default_rng(0).permutation(len(places))
    for i, place in enumerate(order):
        os.preadv(places[place][0], [buffers[i % 8]], places[place][1])
    for fd in handles:
        os.close(fd)
    return len(places) * size


def opened(store: Store, batch: int, **options: Any) -> Any:
    return Stream(batch=batch, exclude_positions=(), **options).open(store, ["x"], seed=0)


def in_numpy(batches: Any, batch: int) -> Callable[[], int]:
    """Shuffled batches in numpy."""
    step, steps = 0, batches.rows // batch

    def read() -> int:
        nonlocal step
        size, step = 0, step + steps
        for at in range(step - steps, step):
            size += batches.gather(at * batch, (at + 1) * batch)["x"].nbytes
        return size

    return read


def in_jax(batches: Any, batch: int) -> Callable[[], int]:
    """Shuffled batches as JAX arrays, made ahead by a thread."""
    iterator = batches.iterate()

    def read() -> int:
        steps = batches.rows // batch
        return sum(jax.block_until_ready(next(iterator)["x"]).nbytes for _ in range(steps))

    return read


def alone(call: Callable, *args: Any) -> Any:
    """What a call returns in a process that does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


def memory(path: pathlib.Path, batch: int) -> dict[str, int]:
    """Bytes that the process takes for 300 batches, above what it took before, and of a window."""
    store = Store.open(path)
    jax.block_until_ready(jax.device_put(np.zeros(4)))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    batches = opened(store, batch)
    for at in range(300):
        jax.block_until_ready(jax.device_put(batches.gather(at * batch, (at + 1) * batch)["x"]))
    return {
        "above_bytes": resident("VmHWM") - before,
        "window_bytes": batches.info["window_bytes"],
    }


def resident(which: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at the most (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def total_bytes(store: Store) -> int:
    return sum(file.stat().st_size for file in files(store))


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per way to read, its speed and its ratio to the plain reads it is held to."""
    rounds = record["bytes_per_second"]
    lines = [
        f"{record['machine']}; JAX {jax.__version__}; {record['date']}; `{record['command']}`. "
        f"{record['rows']:,} rows of {record['width']} bf16, {record['bytes'] / 1e9:.2f} GB, batch "
        f"{record['batch']}, {len(rounds)} rounds. A process that streams takes "
        f"{record['memory']['above_bytes'] / 1e9:.2f} GB for three windows of "
        f"{record['memory']['window_bytes'] / 1e9:.2f} GB and all else.",
        "",
        "| | GB/s (median) | against | ratio (median) | ratio (worst, best) | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in rounds[0]:
        base = BASE[name.split()[0]]
        speed = statistics.median(r[name] for r in rounds) / 1e9
        ratios = sorted(r[name] / r[base] for r in rounds)
        goal = GOALS.get(name, "")
        lines.append(
            f"| {name} | {speed:.2f} | {base} | {statistics.median(ratios):.2f} "
            f"| {ratios[0]:.2f}, {ratios[-1]:.2f} | {goal and f'≥ {goal}'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
