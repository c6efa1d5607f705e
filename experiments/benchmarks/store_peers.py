"""How fast shuffled batches of the same activations come from saex's, SAELens' and saev's stores.

    python experiments/benchmarks/store_peers.py --dir /disk/with/room    # about 6 GB for width 768

Random rows in contexts of 128 are written by each library's own writer: saex's in bfloat16, each
segment shuffled as `saex harvest` does; SAELens' as its `CacheActivationsRunner` does, in float32
and in float16 (it knows no bfloat16 on disk); saev's in float32, which is all it knows. Then each
reader goes through all rows, interleaved in one process (saev's has a process of its own, with
threads), everything in the page cache. The time is that between two batches, so that what a reader
does before its first ones costs nothing. The first two channels say which context a row is of, so
that what is read is known, and how well it is mixed: contexts in a batch.

SAELens' default buffer (20 contexts) does not hold its default batch, so it is given 8192 rows, and
as many as saex's default window; without mixing it gives rows as they lie. saev's `shuffled` loader
is the one that its training uses; it reads examples of 128 tokens, and examples of one.

An environment for it: that of ``quality_topk.py``, and (its Python has to be 3.12 then)

    pip install git+https://github.com/OSU-NLP-Group/saev@3d73f1f7122738563404e4c50a98d897aa18a7d0
"""

import argparse
import importlib.metadata
import logging
import pathlib
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from measure import where, write

from saex.data import Column, Store, StoreWriter
from saex.data.mixing import expected_distinct
from saex.data.stream import Stream

HERE = pathlib.Path(__file__).resolve().parent
CONTEXT = 128
BLOCK = 65_536  # rows written together
HOOK = "blocks.0.hook_resid_post"
GOALS = {"SAELens": 5.0, "saev": 1.0}  # saex's speed over theirs, at least
BASES = {"numpy": "saex: numpy", "JAX": "saex: JAX, 1 thread"}
PACKAGES = {
    "saex": ("saex", "jax"),
    "SAELens": ("torch", "sae-lens", "datasets", "pyarrow"),
    "saev": ("torch", "saev"),
}
Opened = Callable[[], Iterator[Any]]  # batches [rows, width], from anywhere in the data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/store-peers")
    parser.add_argument("--rows", type=int, default=600_064)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 256])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["SAELens", "saev"], choices=list(GOALS))
    parser.add_argument("--keep", action="store_true", help="leave the stores for the next time")
    parser.add_argument("--tiny", action="store_true", help="a minute, to see that it runs")
    parser.add_argument("--out", default=str(HERE / "results" / "store_peers"))
    args = parser.parse_args()
    if args.tiny:
        args.rows, args.widths, args.batch, args.rounds = 32_768, [32], 512, 1
    record = where() | {"versions": versions(args.only), "rows": args.rows, "batch": args.batch}
    folder, record["widths"] = pathlib.Path(args.dir).resolve(), {}
    for width in args.widths:
        ways = all_ways(folder / str(width), args, width)
        one_round(ways, args)  # files come into memory, memory is touched, programs are compiled
        record["widths"][width] = [one_round(ways, args) for _ in range(args.rounds)]
        if not args.keep:
            shutil.rmtree(folder / str(width))
    write(args.out, record, table(record))
    print(table(record))


def versions(peers: list[str]) -> dict[str, str]:
    """Of all packages that take part."""
    names = [name for peer in ("saex", *peers) for name in PACKAGES[peer]]
    return {name: importlib.metadata.version(name) for name in names}


def all_ways(folder: pathlib.Path, args: Any, width: int) -> dict[str, Opened]:
    """Every reader by its name; writes the stores that are not there."""
    ways = saex_ways(folder, args.rows, width, args.batch)
    if "SAELens" in args.only:
        ways |= sae_lens_ways(folder, args.rows, width, args.batch)
    if "saev" in args.only:
        ways |= saev_ways(folder, args.rows, width, args.batch)
    return ways


# ---------------------------------------------------------------------------------------- measuring


def one_round(ways: dict[str, Opened], args: Any) -> dict[str, dict[str, Any]]:
    """What `measured` says of each reader, one after the other."""
    found = {name: measured(open_way(), args.rows, args.batch) for name, open_way in ways.items()}
    print({name: f"{f['rows_per_second']:,.0f}" for name, f in found.items()}, flush=True)
    return found


def measured(batches: Iterator[Any], rows: int, batch: int) -> dict[str, Any]:
    """Speed over the batches of `rows` rows, without the first, which may have been made ahead.

    Those that count are a multiple of 16, as many as SAELens makes at once of its larger buffer.
    """
    steps = rows // batch
    skipped = 16 + steps % 16
    size, started, contexts, kind = 0, 0.0, [], ("", "")
    for _ in range(skipped):
        x = jax.block_until_ready(next(batches))
        started, kind = time.perf_counter(), (str(x.dtype), type(x).__module__.split(".")[0])
    for i in range(steps - skipped):
        x = jax.block_until_ready(next(batches))
        size += x.nbytes
        if i % 8 == 0:
            contexts.append(contexts_of(x))
    ended = time.perf_counter()
    batches.close()
    count = (steps - skipped) * batch
    return {
        "rows_per_second": count / (ended - started),
        "bytes_per_second": size / (ended - started),
        "gives": f"{kind[0].removeprefix('torch.')} ({kind[1].removesuffix('lib')})",
        "contexts": statistics.mean(len(np.unique(c)) for c in contexts),
    }


def contexts_of(x: Any) -> np.ndarray:
    """The context of each row, from the first two channels, which hold it to the base 256."""
    first = x[:, :2].float().numpy() if hasattr(x, "numpy") else np.asarray(x)[:, :2]
    return first.astype(np.float32) @ np.array([1, 256], np.float32)


def contexts_at_random(rows: int, batch: int) -> float:
    """Different contexts in a batch that is drawn from all rows."""
    return expected_distinct(np.arange(rows) // CONTEXT, batch)


# ---------------------------------------------------------------------------------- the same rows


def blocks(rows: int, width: int) -> Iterator[np.ndarray]:
    """Rows float32 [<= BLOCK, width] of values that bfloat16 can hold, in contexts of 128."""
    noise = np.random.default_rng(0).standard_normal((min(rows, BLOCK), width), np.float32)
    noise = noise.astype(ml_dtypes.bfloat16).astype(np.float32)
    for start in range(0, rows, BLOCK):
        block = noise[: min(BLOCK, rows - start)]
        block[:, 1], block[:, 0] = divmod((start + np.arange(len(block))) // CONTEXT, 256)
        yield block


def made(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The folder, written if it is not there."""
    if not path.exists():
        unfinished = path.with_name(path.name + "-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(path)
    return path


# --------------------------------------------------------------------------------------------- saex


def saex_ways(folder: pathlib.Path, rows: int, width: int, batch: int) -> dict[str, Opened]:
    """Streams with default settings: in numpy on this thread, and as JAX arrays by another one."""

    def write(path: pathlib.Path) -> None:
        with StoreWriter(path, {"x": Column((width,))}, {"rows": rows}) as writer:
            for block in blocks(rows, width):
                at = writer.rows
                writer.append({"x": block})
                writer.commit({}, shuffle=(0, at))
            writer.finish()

    store = Store.open(made(folder / "saex", write))

    def in_numpy() -> Iterator[np.ndarray]:
        batches = Stream(batch=batch).open(store, ["x"], seed=0)
        for step in range(2**40):
            yield batches.gather(step * batch, (step + 1) * batch)["x"]

    def in_jax(dtype: str | None) -> Iterator[jax.Array]:
        batches = Stream(batch=batch).open(store, ["x"], seed=0, dtype=dtype)
        for found in batches.iterate():
            yield found["x"]

    return {
        "saex: numpy": going_on(in_numpy()),
        "saex: JAX, 1 thread": going_on(in_jax(None)),
        "saex: JAX float32, 1 thread": going_on(in_jax("float32")),
    }


def going_on(batches: Iterator[Any]) -> Opened:
    """Each call goes on where the one before stopped, as a training run's second epoch does."""
    return lambda: (x for x in batches)


# ------------------------------------------------------------------------------------------ SAELens


def sae_lens_ways(folder: pathlib.Path, rows: int, width: int, batch: int) -> dict[str, Opened]:
    """ActivationsStore of cached activations, with its mixing buffer."""
    import datasets
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="All samples in the training dataset")

    def opened(dtype: str, contexts: int, mixed: float) -> Opened:
        path = made(folder / f"sae_lens-{dtype}", lambda p: sae_lens_write(p, dtype, rows, width))
        store = ActivationsStore(
            model=None, dataset=None, streaming=False, hook_name=HOOK, hook_head_index=None,
            context_size=CONTEXT, d_in=width, n_batches_in_buffer=contexts,
            total_training_tokens=rows, store_batch_size_prompts=32,
            train_batch_size_tokens=batch, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"), dtype=dtype, cached_activations_path=str(path),
            activations_mixing_fraction=mixed,
        )  # fmt: skip
        return going_on(store)

    small, large = 8192 // CONTEXT, 131_072 // CONTEXT
    return {
        "SAELens: float32, 8192 rows mixed": opened("float32", small, 0.5),
        "SAELens: float16, 8192 rows mixed": opened("float16", small, 0.5),
        "SAELens: float16, 131072 rows mixed": opened("float16", large, 0.5),
        "SAELens: float16, nothing mixed": opened("float16", small, 0.0),
    }


def sae_lens_write(path: pathlib.Path, dtype: str, rows: int, width: int) -> None:
    """A cached dataset: what `CacheActivationsRunner.run` does with activations."""
    import torch
    from datasets import Array2D, Dataset, Features, Sequence, Value
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    features = Features(
        {
            HOOK: Array2D(shape=(CONTEXT, width), dtype=dtype),
            "token_ids": Sequence(Value(dtype="int32"), length=CONTEXT),
        }
    )
    for i, block in enumerate(blocks(rows, width)):
        acts = torch.from_numpy(block).to(getattr(torch, dtype)).reshape(-1, CONTEXT, width)
        tokens = torch.zeros((len(acts), CONTEXT), dtype=torch.int32)
        shard = Dataset.from_dict({HOOK: acts, "token_ids": tokens}, features=features)
        shard.save_to_disk(str(path / ".tmp_shards" / f"shard_{i:05d}"), num_shards=1)
    CacheActivationsRunner._consolidate_shards(path / ".tmp_shards", path, copy_files=False)


# --------------------------------------------------------------------------------------------- saev


def saev_ways(folder: pathlib.Path, rows: int, width: int, batch: int) -> dict[str, Opened]:
    """The shuffled loader by 4 threads, its default."""
    import torch.multiprocessing
    from saev.data import shuffled

    torch.multiprocessing.set_start_method("spawn", force=True)  # JAX's threads forbid a fork
    logging.getLogger().setLevel(logging.WARNING)

    def opened(tokens: int) -> Opened:
        path = made(folder / f"saev-{tokens}", lambda p: saev_write(p, tokens, rows, width))
        (shards,) = (path / "saev" / "shards").iterdir()
        config = shuffled.Config(shards=shards, layer=0, batch_size=batch, n_threads=4)

        def batches() -> Iterator[Any]:
            for found in shuffled.DataLoader(config):
                yield found["act"]

        return batches

    return {
        "saev: 128 tokens an example, 4 threads": opened(CONTEXT),
        "saev: 1 token an example, 4 threads": opened(1),
    }


def saev_write(path: pathlib.Path, tokens: int, rows: int, width: int) -> None:
    """Four shards by its ShardWriter, [examples, 1 layer, tokens, width]; one a thread."""
    import torch
    from saev.data import shards

    root = path / "saev" / "shards"
    root.mkdir(parents=True)
    examples = rows // tokens
    metadata = shards.Metadata(
        family="clip", ckpt="noise", layers=(0,), content_tokens_per_example=tokens,
        cls_token=False, d_model=width, n_examples=examples,
        max_tokens_per_shard=-(-examples // 4) * tokens, data="", dataset=path,
    )  # fmt: skip
    metadata.dump(root)
    with shards.ShardWriter(root, metadata) as writer:
        start = 0
        for block in blocks(rows, width):
            acts = torch.from_numpy(block).reshape(-1, 1, tokens, width)
            writer.write_batch(acts, start)
            start += len(acts)


# ---------------------------------------------------------------------------------------- the table


def table(record: dict[str, Any]) -> str:
    """Markdown: for each width a row per reader, and how many times as fast saex is."""
    told = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    random = contexts_at_random(record["rows"], record["batch"])
    lines = [
        f"{record['machine']}; {record['date']}; `{record['command']}`; {told}. "
        f"{record['rows']:,} rows in contexts of {CONTEXT}, batches of {record['batch']} rows, "
        "warm page cache; median over rounds of rows a second, ratios of the same round. A batch "
        f"drawn from all rows has {random:.0f} contexts.",
    ]
    for width, rounds in record["widths"].items():
        bases = "".join(f" saex in {name} / this |" for name in BASES)
        lines += [
            "",
            f"Width {width}, {len(rounds)} rounds:",
            "",
            f"| reader | gives | contexts a batch | rows/s | worst, best | GB/s |{bases} goal |",
            "| --- | --- | --- | --- | --- | --- |" + " --- |" * len(BASES) + " --- |",
        ]
        lines += [_line(name, rounds) for name in rounds[0]]
    return "\n".join(lines) + "\n"


def _line(name: str, rounds: list[dict[str, dict[str, Any]]]) -> str:
    speeds = sorted(r[name]["rows_per_second"] for r in rounds)
    gigabytes = statistics.median(r[name]["bytes_per_second"] for r in rounds) / 1e9
    contexts = statistics.mean(r[name]["contexts"] for r in rounds)
    ratios = "".join(f" {_times(rounds, base, name):.2f} |" for base in BASES.values())
    goal = GOALS.get(name.split(":")[0])
    return (
        f"| {name} | {rounds[0][name]['gives']} | {contexts:.0f} "
        f"| {statistics.median(speeds):,.0f} | {speeds[0]:,.0f}, {speeds[-1]:,.0f} "
        f"| {gigabytes:.2f} |{ratios} {f'≥ {goal:.0f}' if goal else ''} |"
    )


def _times(rounds: list[dict[str, dict[str, Any]]], fast: str, slow: str) -> float:
    return statistics.median(
        r[fast]["rows_per_second"] / r[slow]["rows_per_second"] for r in rounds
    )


if __name__ == "__main__":
    main()
