"""Everything to be asked of a GPU, in one command: open questions, ops, whole steps, peers.

    python experiments/benchmarks/gpu.py                    # about 15 minutes on an H200
    python experiments/benchmarks/gpu.py --tiny             # the same code on any CPU, no figures

Ops and steps run at shapes A to F, by each backend that has the op, beside XLA's own form, and are
divided by the floor (``saex.cost``). bf16 matmul inputs, fp32 weights and Adam, AuxK off and on.
Indices are Zipf-distributed: uniform ones would flatter sums over latents. Where torch and a
library are installed its step runs on the same rows (``gpu_peers.py``). Each figure is the minimum
over rounds of the mean of several calls in a row, after two that compile.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_questions
import jax
import jax.numpy as jnp
import numpy as np
from measure import where

from saex import cost
from saex.kernels import encode_topk, sparse_affine, sparse_decode, topk
from saex.sae import TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train.optim import Optim
from saex.train.state import init_state
from saex.train.step import hyper_arrays, make_step

HERE = pathlib.Path(__file__).resolve().parent
SHAPES = {  # rows, d, n, k
    "A": (4096, 768, 24576, 32),
    "B": (8192, 768, 32768, 32),
    "C": (4096, 2304, 16384, 64),
    "D": (8192, 2304, 65536, 64),
    "E": (8192, 4096, 131072, 64),
    "F": (32768, 768, 32768, 32),
}
TINY = {"tiny": (8, 128, 64, 2)}
TABLES = {
    "encode": encode_topk.IMPLS,
    "decode": sparse_decode.DECODE,
    "dots": sparse_decode.DOTS,
    "scatter": sparse_decode.SCATTER,
    "backward": sparse_affine.GRADS,
}
# what stands in for "gpu" in a whole step; the first is what saex does by itself
STEPS = {
    "XLA": (),
    "Hopper backward": ("backward",),
    "Hopper backward, decode": ("backward", "decode", "dots", "scatter"),
    "Hopper all": ("backward", "decode", "dots", "scatter", "encode"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20, help="in a row, between two looks at time")
    parser.add_argument("--hardware", default="h200", help="whose floor; see saex info --hardware")
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    parser.add_argument("--out", default=str(HERE / "results" / "gpu"))
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.calls, args.out = 1, 1, args.out + "_tiny"
    clock = Clock(args.rounds, args.calls)
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes}
    found = {}
    with gpu_table_on_cpu():
        for part in args.parts:
            found[part] = PARTS[part](clock, shapes, args.hardware)
            write(args.out, found, shapes)  # what is known so far survives what comes


def gpu_table_on_cpu() -> Any:
    """Without a GPU the GPU's backends are tried all the same (Hopper's are interpreted)."""
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for table in TABLES.values():
        stack.enter_context(swapped(table, "cpu", table["gpu"]))
    return stack


def runs_here(op: str, backend: str) -> bool:
    """All on a GPU; on CPU the kernel of several warpgroups is left out: interpreting it can hang
    where there are fewer cores than warpgroups.
    """
    return jax.default_backend() != "cpu" or (op, backend) != ("encode", "pallas_gpu")


@contextlib.contextmanager
def swapped(table: dict, key: str, backend: Callable) -> Iterator[None]:
    """``table[key]`` is another backend for a while."""
    before, table[key] = table[key], backend
    jax.clear_caches()
    try:
        yield
    finally:
        table[key] = before
        jax.clear_caches()


class Clock:
    """Milliseconds of calls, or the error that they end in: one bad kernel ends no benchmark."""

    def __init__(self, rounds: int, calls: int):
        """Minimum over rounds of the mean over calls."""
        self.rounds, self.calls = rounds, calls

    def __call__(self, call: Callable[[], Any]) -> float | str:
        """Milliseconds of one call."""
        try:
            for _ in range(2):
                jax.block_until_ready(call())
            return min(self._round(call) for _ in range(self.rounds))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"

    def _round(self, call):
        started = time.perf_counter()
        for _ in range(self.calls):
            out = call()
        jax.block_until_ready(out)
        return round(1e3 * (time.perf_counter() - started) / self.calls, 4)


def jitted(f: Callable, *args: Any) -> Callable[[], Any]:
    """A call of the compiled function on the same arrays."""
    compiled = jax.jit(f)
    return lambda: compiled(*args)


# -------------------------------------------------------------------------------------------- data


def zipf_codes(b: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices): latent i fires with probability ~ 1 / (i + 8), k different ones a row."""
    gumbel = np.random.default_rng(0).gumbel(size=(min(b, 1024), n)).astype(np.float32)
    scores = gumbel - np.log(np.arange(n, dtype=np.float32) + 8)
    chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k].astype(np.int32)
    chosen = np.random.default_rng(1).permutation(n).astype(np.int32)[chosen]
    indices = np.resize(chosen, (b, k))
    return jnp.abs(normal(2, b, k)), jnp.asarray(indices)


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32."""
    return jax.random.normal(jax.random.key(seed), shape)


# ------------------------------------------------------------------------------------------- parts


def ops(clock: Clock, shapes: dict, hardware: str) -> dict:
    """Milliseconds of each op, by shape and backend, and GB/s of what has to be moved at least."""
    found: dict[str, dict] = {}
    for shape, sizes in shapes.items():
        for op, (calls, moved) in op_calls(*sizes).items():
            times = {name: clock(call) for name, call in calls.items()}
            rates = {
                name: round(moved / ms / 1e6)
                for name, ms in times.items()
                if not isinstance(ms, str)
            }
            found.setdefault(shape, {})[op] = {"ms": times, "GB/s": rates}
            print(shape, op, times, flush=True)
    return found


def op_calls(b: int, d: int, n: int, k: int) -> dict[str, tuple[dict[str, Callable], float]]:
    """By op: its calls by backend, and the bytes that any of them has to move."""
    values, indices = zipf_codes(b, n, k)
    dvalues, g, x, W = normal(3, b, k), normal(4, b, d), normal(5, b, d), normal(6, n, d) / d**0.5
    gathered, dictionary, rows = 4 * b * k * d, 4 * n * d, 4 * b * d

    def each(op, *args, **static):
        return {
            name: jitted(lambda *a, f=TABLES[op][name]: f(*a, *static.values()), *args)
            for name in ("gpu", "pallas_gpu")
            if runs_here(op, name)
        }

    scores = normal(7, b, n)
    selection = {
        "lax.top_k": jitted(lambda p: tuple(jax.lax.top_k(p, k)), scores),
        "gpu": jitted(lambda p: topk.IMPLS["gpu"](p, k), scores),
    }
    encode = each("encode", x, x[0], W, normal(8, n), k=k, dtype="bfloat16")
    encode["matmul alone"] = jitted(gpu_questions.matmul, x, W)
    return {
        "top_k": (selection, 4 * b * n),
        "encode": (encode, dictionary + rows + 4 * b * n),
        "decode": (each("decode", values, indices, W), gathered + rows),
        "dots": (each("dots", indices, g, W), gathered + rows),
        "scatter": (each("scatter", values, indices, g, n=n), gathered + dictionary),
        "backward": (
            each("backward", values, dvalues, indices, g, x, W),
            2 * gathered + 3 * dictionary,
        ),
    }


def steps(clock: Clock, shapes: dict, hardware: str) -> dict:
    """Milliseconds of a whole step, and how many times the floor that is."""
    found = {}
    for shape, (b, d, n, k) in shapes.items():
        sae = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16", aux_coefficient=0.0)
        floor = 1e3 * cost.step(sae, b, MeshConfig(), cost.hardware(hardware)).seconds
        times = {
            name: step_time(clock, sae, b, ops)
            for name, ops in STEPS.items()
            if all(runs_here(op, "pallas_gpu") for op in ops)
        }
        aux = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16")
        times["XLA, AuxK on, nothing dead"] = step_time(clock, aux, b, ())
        found[shape] = {"floor": round(floor, 4), "ms": times}
        print(shape, found[shape], flush=True)
    return found


def step_time(clock: Clock, sae: TopK, b: int, hopper: Sequence[str]) -> float | str:
    """Milliseconds of ``make_step``, with Hopper's kernels for the ops that are named."""
    key = "cpu" if jax.default_backend() == "cpu" else "gpu"
    with contextlib.ExitStack() as stack:
        for op in hopper:
            stack.enter_context(swapped(TABLES[op], key, TABLES[op]["pallas_gpu"]))
        jax.clear_caches()
        return clock(saex_step(sae, b))


def saex_step(sae: TopK, b: int) -> Callable[[], Any]:
    """One update after the other on the same rows: Zipf-weighted sums of random directions."""
    mesh, optim = make_mesh(MeshConfig()), Optim()
    values, indices = zipf_codes(b, 4096, 16)
    x = sparse_decode.sparse_decode(values, indices, normal(9, 4096, sae.d_in), "gpu")
    with jax.set_mesh(mesh):
        batch = {"x": jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))}
        sample = {"x": np.asarray(x[: min(b, 4096)])}
        state = [init_state(sae, optim.transformation(), jax.random.key(0), sample, mesh, "tp")]
        step, hyper = make_step(sae, optim, 1000), hyper_arrays(sae, optim, 1000)
        key = jax.random.key(0)

    def call():
        with jax.set_mesh(mesh):
            state[0], out = step(state[0], batch, key, hyper)
        return out

    return call


def questions(clock: Clock, shapes: dict, hardware: str) -> dict:
    """The answers to what could not be known without a GPU."""
    found = {}
    for name, ask in gpu_questions.ALL.items():
        try:
            found[name] = ask(clock, next(iter(shapes)) == "tiny")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        print(name, found[name], flush=True)
    return found


def peers(clock: Clock, shapes: dict, hardware: str) -> dict:
    """Milliseconds of the steps of libraries in torch, where they are installed."""
    try:
        import gpu_peers
    except ImportError as error:
        return {"not measured": str(error)}
    return {shape: gpu_peers.steps(clock, *sizes) for shape, sizes in shapes.items()}


PARTS = {"questions": questions, "ops": ops, "steps": steps, "peers": peers}


# ------------------------------------------------------------------------------------------ tables


def write(out: str, found: dict, shapes: dict) -> None:
    """JSON with everything, and a table to read."""
    record = where() | {"device": jax.devices()[0].device_kind, "versions": versions()} | found
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(table(record, shapes)) + "\n")


def versions() -> dict[str, str]:
    """Of what is installed."""
    names = ("saex", "jax", "jaxlib", "torch", "eai-sparsify", "sae-lens", "dictionary-learning")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def table(record: dict, shapes: dict) -> list[str]:
    """Markdown."""
    lines = [
        "# saex on a GPU",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['device']}, {record['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]
    if "steps" in record:
        lines += [
            "",
            "| shape | b, d, n, k | step | ms | rows/s | x floor |",
            "|---|---|---|---|---|---|",
        ]
        for shape, row in record["steps"].items():
            times = row["ms"] | record.get("peers", {}).get(shape, {})
            size = ", ".join(map(str, shapes[shape]))
            for name, ms in times.items():
                rate, ratio = ("", "")
                if not isinstance(ms, str):
                    rate, ratio = f"{1e3 * shapes[shape][0] / ms:,.0f}", f"{ms / row['floor']:.2f}"
                lines.append(f"| {shape} | {size} | {name} | {ms} | {rate} | {ratio} |")
    if "ops" in record:
        lines += ["", "| shape | op | backend | ms | GB/s |", "|---|---|---|---|---|"]
        for shape, by_op in record["ops"].items():
            for op, row in by_op.items():
                for name, ms in row["ms"].items():
                    lines.append(
                        f"| {shape} | {op} | {name} | {ms} | {row['GB/s'].get(name, '')} |"
                    )
    for name, answer in record.get("questions", {}).items():
        lines += ["", f"**{name}**: {answer}"]
    return lines


if __name__ == "__main__":
    main()
