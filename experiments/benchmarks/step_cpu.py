"""A whole training step on CPU: saex against the peers' own, side by side in one process.

    python experiments/benchmarks/step_cpu.py                    # default malloc
    T=glibc.malloc
    GLIBC_TUNABLES=$T.arena_max=1:$T.hugetlb=1:$T.mmap_threshold=8589934592:\
$T.trim_threshold=8589934592 python experiments/benchmarks/step_cpu.py --out=...tuned

TopK, float32, Adam, AuxK on with nothing dead, firing counts, unit decoder rows where a library has
them: what each library's own trainer does in a step, on the same rows, which come from a dictionary
whose features fire with Zipf frequencies. Milliseconds, minimum and median over rounds in which
every library takes one step. Beside them the encoder's matmul alone, in both frameworks, and Adam's
memory traffic (a copy of as many bytes).

The environment is that of ``quality_topk.py`` with ``eai-sparsify==1.3.3``, ``schedulefree``,
``natsort``, ``simple-parsing`` and ``accelerate`` (all with the same constraint).
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measure import saex_step, where

from saex.sae import TopK

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {  # rows, d, n, k
    "quickstart": (4096, 256, 2048, 32),
    "S1": (4096, 512, 8192, 32),
    "S2": (2048, 768, 24576, 32),
}
PACKAGES = ("saex", "jax", "torch", "sae-lens", "dictionary-learning", "eai-sparsify")
Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", default=str(HERE / "results" / "step_cpu"))
    args = parser.parse_args()
    found = {}
    for shape in args.shapes:
        found[shape] = measure(*SHAPES[shape], args.rounds)
        print(shape, {name: t["min"] for name, t in found[shape].items()}, flush=True)
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    malloc = os.environ.get("GLIBC_TUNABLES", "default")
    record = where() | {"versions": versions, "malloc": malloc, "rounds": args.rounds}
    record["milliseconds"] = found
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(record))


def measure(b: int, d: int, n: int, k: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by name: one step of each library, and the floors."""
    x = zipf_rows(b, d)
    calls = {
        "saex": saex_step(x, TopK(x.shape[1], n, k=k)),
        "sae_lens": sae_lens_step(x, n, k),
        "dictionary_learning": dictionary_learning_step(x, n, k),
        "sparsify": sparsify_step(x, n, k),
        "matmul (XLA)": matmul_jax(x, n),
        "matmul (torch)": matmul_torch(x, n),
        "Adam's traffic": traffic(d, n),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if i > 1:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {
        name: {"min": round(min(t), 1), "median": round(statistics.median(t), 1)}
        for name, t in times.items()
    }


def zipf_rows(b: int, d: int, features: int = 4096, active: int = 24) -> np.ndarray:
    """Rows float32 [b, d] of mean squared norm 1; feature i fires with probability ~ 1 / i."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(features, d)).astype(np.float32)
    frequency = 1 / np.arange(1, features + 1)
    chosen = rng.choice(features, (b, active), p=frequency / frequency.sum())
    size = rng.exponential(size=(b, active, 1)).astype(np.float32)
    x = np.zeros((b, d), np.float32)
    for j in range(active):
        x += size[:, j] * directions[chosen[:, j]]
    return x / np.float32(np.sqrt(np.mean(np.sum(x * x, axis=1))))


# ---------------------------------------------------------------------------------------- the steps


def sae_lens_step(x: np.ndarray, n: int, k: int) -> Step:
    """SAETrainer._train_step: dead-latent loss, firing counts, clipping, Adam."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rows = torch.from_numpy(x)
    config = SAETrainerConfig(
        total_training_samples=1000 * len(x),
        train_batch_size_samples=len(x),
        lr=1e-4,
        lr_end=1e-5,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=1000,
    )
    sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=n, k=k))
    trainer = SAETrainer(config, sae, iter([]))
    return lambda: trainer._train_step(sae=sae, sae_in=rows) and None


def dictionary_learning_step(x: np.ndarray, n: int, k: int) -> Step:
    """TopKTrainer.update: AuxK, threshold, tangent gradients, clipping, Adam, unit rows."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    rows, steps = torch.from_numpy(x), iter(range(10**6))
    trainer = TopKTrainer(
        steps=10**6, activation_dim=x.shape[1], dict_size=n, k=k, layer=0, lm_name="", device="cpu"
    )
    return lambda: trainer.update(next(steps), rows) and None


def sparsify_step(x: np.ndarray, n: int, k: int) -> Step:
    """What sparsify's trainer does with a SparseCoder in a step, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    rows = torch.from_numpy(x)
    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=n, k=k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
    silent = torch.zeros(n, dtype=torch.long)

    def call():
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=rows, y=rows, dead_mask=silent > 10_000_000)
        fired = torch.zeros(n, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(rows))
        silent[fired] = 0

    return call


# --------------------------------------------------------------------------------------- the floors


def matmul_jax(x: np.ndarray, n: int) -> Step:
    """x W^T by XLA."""
    a, W = jnp.asarray(x), jax.random.normal(jax.random.key(0), (n, x.shape[1]))
    multiply = jax.jit(lambda a, W: jnp.einsum("bd,nd->bn", a, W))
    return lambda: multiply(a, W)


def matmul_torch(x: np.ndarray, n: int) -> Step:
    """x W^T by torch, into memory that is there already."""
    a, W = torch.from_numpy(x), torch.randn(n, x.shape[1])
    out = torch.empty(len(x), n)
    return lambda: torch.matmul(a, W.T, out=out) is None


def traffic(d: int, n: int) -> Step:
    """14 arrays of n x d read or written: weights, moments and gradients of two matrices."""
    a, b = np.ones(7 * n * d, np.float32), np.zeros(7 * n * d, np.float32)
    return lambda: np.copyto(b, a)


def table(record: dict[str, Any]) -> str:
    """Markdown: one row per shape and library."""
    versions = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    lines = [
        "# A training step on CPU",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}; malloc: {record['malloc']}; {versions}.  ",
        f"Milliseconds over {record['rounds']} interleaved rounds; float32, 2 threads.",
        "",
        "| shape | b, d, n, k | what | min | median | this / saex | this / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, times in record["milliseconds"].items():
        size = ", ".join(map(str, SHAPES[shape]))
        floor = times["matmul (XLA)"]["min"] + times["Adam's traffic"]["min"]
        for name, t in times.items():
            lines.append(
                f"| {shape} | {size} | {name} | {t['min']} | {t['median']} | "
                f"{t['min'] / times['saex']['min']:.2f} | {t['min'] / floor:.2f} |"
            )
    lines += ["", "floor: the encoder's matmul (XLA) and Adam's traffic."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
