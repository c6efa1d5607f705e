"""A whole training step on CPU: saex against the peers' own, side by side in one process.

    python experiments/benchmarks/step_cpu.py                    # default malloc
    T=glibc.malloc
    GLIBC_TUNABLES=$T.arena_max=1:$T.hugetlb=1:$T.mmap_threshold=8589934592:\
$T.trim_threshold=8589934592 python experiments/benchmarks/step_cpu.py --out=...tuned

    python experiments/benchmarks/step_cpu.py --dtypes float32 bfloat16 --only saex --out=...bf16

TopK, Adam, AuxK on with nothing dead, firing counts, unit decoder rows where a library has them:
what each library's own trainer does in a step, on the same rows, which come from a dictionary whose
features fire with Zipf frequencies. Milliseconds, minimum and median over rounds in which every
library takes one step. A library in torch runs as it comes and, as a variant, with torch's fused
Adam. Beside them the encoder's matmul alone, in both frameworks, and Adam's memory traffic (a copy
of as many bytes). The floor is ``saex.cost``'s on this machine, measured in the same run.

``--dtypes``: of saex's matmul inputs; both are steps of the same rounds, so their ratio is of one
run. The goal for bfloat16 (1.25 and 1.5 times as fast as float32 at S2 and S1) needs a CPU with
AMX; the table says whether this one has it.

The environment is that of ``quality_topk.py`` with ``eai-sparsify==1.3.3``, ``schedulefree``,
``natsort``, ``simple-parsing`` and ``accelerate`` (all with the same constraint).
"""

import argparse
import importlib.metadata
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import machine, saex_step, step_floor, where, write, zipf_rows

from saex.sae import TopK

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {  # rows, d, n, k
    "quickstart": (4096, 256, 2048, 32),
    "S1": (4096, 512, 8192, 32),
    "S2": (2048, 768, 24576, 32),
    "tiny": (64, 32, 256, 4),
}
HALF = ", bfloat16"
DTYPES = {"float32": "", "bfloat16": HALF}  # of matmul inputs, and how a row's name ends
PACKAGES = ("saex", "jax", "torch", "sae-lens", "dictionary-learning", "eai-sparsify")
USUAL = ["quickstart", "S1", "S2"]
Step = Callable[[], Any]
Calls = dict[str, Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=USUAL, choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    parser.add_argument("--out", default=str(HERE / "results" / "step_cpu"))
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.rounds, args.out = ["tiny"], 1, args.out + "_tiny"
    found = {}
    for shape in args.shapes:
        found[shape] = measure(*SHAPES[shape], args.rounds, args.dtypes, args.only)
        print(shape, {name: t["min"] for name, t in found[shape].items()}, flush=True)
    malloc = os.environ.get("GLIBC_TUNABLES", "default")
    record = where() | {"versions": versions(), "malloc": malloc, "rounds": args.rounds}
    record |= {"constants": machine().describe(), "amx": has_amx(), "milliseconds": found}
    write(args.out, record, table(record))


def measure(
    b: int, d: int, n: int, k: int, rounds: int, dtypes: Sequence[str], only: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds by name: one step of each library, what a step has to do, and the floors."""
    x = zipf_rows(b, d)
    saes = {DTYPES[dtype]: TopK(d, n, k=k, matmul_dtype=dtype) for dtype in dtypes}
    calls: dict[str, Step] = {"saex" + name: saex_step(x, sae) for name, sae in saes.items()}
    for name in only:
        calls |= LIBRARIES[name](x, n, k)
    for dtype in dtypes:
        calls["matmul (XLA)" + DTYPES[dtype]] = matmul_jax(x, n, dtype)
    if set(only) - {"saex"}:
        calls["matmul (torch)"] = matmul_torch(x, n)
    calls["Adam's traffic"] = traffic(d, n)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if i > 1:
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {
        name: {"min": round(min(t), 2), "median": round(statistics.median(t), 2)}
        for name, t in times.items()
    }
    for name, sae in saes.items():
        ms = round(step_floor(sae, b), 3)
        found["floor" + name] = {"min": ms, "median": ms}
    return found


def versions() -> dict[str, str]:
    """Of what is installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles."""
    info = pathlib.Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


# ---------------------------------------------------------------------------------------- the steps


def with_fused_adam(make: Callable, name: str) -> Callable[[np.ndarray, int, int], Calls]:
    """The library's step as it comes, and with torch's fused Adam."""

    def calls(x: np.ndarray, n: int, k: int) -> Calls:
        plain, _ = make(x, n, k)
        step, optimizer = make(x, n, k)
        for group in optimizer.param_groups:  # read in every step; no state has been made yet
            group["fused"], group["foreach"] = True, False
        return {name: plain, name + ", fused Adam": step}

    return calls


def sae_lens_step(x: np.ndarray, n: int, k: int) -> tuple[Step, Any]:
    """(SAETrainer._train_step: dead-latent loss, firing counts, clipping, Adam; its optimiser)."""
    import sae_lens
    import torch
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
    return lambda: trainer._train_step(sae=sae, sae_in=rows) and None, trainer.optimizer


def dictionary_learning_step(x: np.ndarray, n: int, k: int) -> tuple[Step, Any]:
    """(TopKTrainer.update: AuxK, threshold, tangent gradients, clipping, Adam, unit rows; its
    optimiser).
    """
    import torch
    from dictionary_learning.trainers.top_k import TopKTrainer

    rows, steps = torch.from_numpy(x), iter(range(10**6))
    trainer = TopKTrainer(
        steps=10**6, activation_dim=x.shape[1], dict_size=n, k=k, layer=0, lm_name="", device="cpu"
    )
    return lambda: trainer.update(next(steps), rows) and None, trainer.optimizer


def sparsify_step(x: np.ndarray, n: int, k: int) -> tuple[Step, Any]:
    """(What sparsify's trainer does with a SparseCoder in a step, with Adam; that)."""
    import torch
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

    return call, optimizer


LIBRARIES: dict[str, Callable[[np.ndarray, int, int], Calls]] = {
    "saex": lambda x, n, k: {},  # by dtype, see measure
    "sae_lens": with_fused_adam(sae_lens_step, "sae_lens"),
    "dictionary_learning": with_fused_adam(dictionary_learning_step, "dictionary_learning"),
    "sparsify": with_fused_adam(sparsify_step, "sparsify"),
}


# --------------------------------------------------------------------------------------- the floors


def matmul_jax(x: np.ndarray, n: int, dtype: str) -> Step:
    """x W^T by XLA, float32 out, of inputs that have the dtype."""
    a, W = jnp.asarray(x, dtype), jax.random.normal(jax.random.key(0), (n, x.shape[1]), dtype)
    multiply = jax.jit(lambda a, W: jnp.einsum("bd,nd->bn", a, W, preferred_element_type="f4"))
    return lambda: multiply(a, W)


def matmul_torch(x: np.ndarray, n: int) -> Step:
    """x W^T by torch, into memory that is there already."""
    import torch

    a, W = torch.from_numpy(x), torch.randn(n, x.shape[1])
    out = torch.empty(len(x), n)
    return lambda: torch.matmul(a, W.T, out=out) is None


def traffic(d: int, n: int) -> Step:
    """14 arrays of n x d read or written: weights, moments and gradients of two matrices."""
    a, b = np.ones(7 * n * d, np.float32), np.zeros(7 * n * d, np.float32)
    return lambda: np.copyto(b, a)


def table(record: dict[str, Any]) -> str:
    """Markdown: one row per shape and library."""
    told = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    lines = [
        "# A training step on CPU",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, {'with' if record['amx'] else 'no'} AMX; malloc: "
        f"{record['malloc']}; {told}.  ",
        f"Milliseconds over {record['rounds']} interleaved rounds; 2 threads.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| shape | b, d, n, k | what | min | median | this / saex | this / floor | "
        "this / (matmul + Adam) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, times in record["milliseconds"].items():
        size = ", ".join(map(str, SHAPES[shape]))
        for name, t in times.items():
            half = HALF if name.endswith(HALF) or "saex" not in times else ""
            base = times[f"matmul (XLA){half}"]["min"] + times["Adam's traffic"]["min"]
            ratios = (times["saex" + half], times["floor" + half])
            cells = [f"{t['min'] / max(of['min'], 1e-3):.2f}" for of in ratios]
            lines.append(
                f"| {shape} | {size} | {name} | {t['min']} | {t['median']} | "
                f"{' | '.join(cells)} | {t['min'] / base:.2f} |"
            )
        if "saex" in times and "saex" + HALF in times:
            gain = times["saex"]["min"] / times["saex" + HALF]["min"]
            lines.append(f"| {shape} | {size} | float32 / bfloat16 of saex | {gain:.2f} | | | | |")
    lines += [
        "",
        "floor: `saex.cost` on this machine. matmul + Adam: the encoder's matmul by XLA and Adam's "
        "traffic, as measured here; rows in bfloat16 are compared with what is in bfloat16.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
