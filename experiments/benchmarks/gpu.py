"""Everything to be asked of a GPU, in one command: open questions, ops, whole steps, peers.

    python experiments/benchmarks/gpu.py                    # about 20 minutes on an H200
    python experiments/benchmarks/gpu.py --parts peers --shapes A B     # adds to what is there
    python experiments/benchmarks/gpu.py --tiny             # the same code on any CPU, no figures

Ops and steps run at shapes A to F, by each backend that has the op, beside XLA's own form, and are
divided by the floor (``saex.cost``). bf16 matmul inputs, fp32 weights and Adam, AuxK off and on.
Latents are Zipf-distributed: uniform ones would flatter sums over them. Where torch and a library
are installed its step runs on the very rows that saex's has (``gpu_peers.py``). Each figure is the
minimum over rounds of the mean of several calls in a row, after two that compile.

Each part has a process of its own, so that JAX's memory (it takes most of a device at once) and
torch's never meet. Results are merged into those of earlier runs on the same kind of device.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from gpu_clock import SHAPES, TINY
from measure import where

from saex import cost
from saex.sae import TopK
from saex.sharding import MeshConfig

HERE = pathlib.Path(__file__).resolve().parent
PARTS = {  # and the program that measures it
    "questions": "gpu_parts.py",
    "ops": "gpu_parts.py",
    "steps": "gpu_parts.py",
    "peers": "gpu_peers.py",
}


OWN, GOAL = "XLA", 1.6  # saex's step as it is by default; times the floor that it is to take
GOALS = {  # how many times as long as it a peer's step is to take, in bfloat16
    "eai-sparsify": 2,
    "OpenAI's algorithm in torch": 2,
    "sae-lens": 3,
    "sae-lens, compiled": 3,
    "sae-lens, sparse activations": 3,
}
DEAD = 8  # of gpu_ops.py, which would start a device here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20, help="in a row, between two looks at time")
    parser.add_argument("--hardware", default="h200", help="whose floor; see saex info --hardware")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that a part may take")
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    parser.add_argument("--out", default=str(HERE / "results" / "gpu"))
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.calls, args.shapes = 1, 1, list(TINY)
        args.out += "_tiny"
    for part in args.parts:
        told = measured(part, args)
        write(pathlib.Path(args.out), part, told, args.hardware)


def measured(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the process of a part has handed on by its end, whatever that was."""
    with tempfile.TemporaryDirectory() as folder:
        to = pathlib.Path(folder) / "found.json"
        command = [sys.executable, str(HERE / PARTS[part]), "--part", part, "--to", str(to)]
        command += ["--rounds", str(args.rounds), "--calls", str(args.calls)]
        try:
            done = subprocess.run([*command, "--shapes", *args.shapes], timeout=args.limit)
            ended = "" if done.returncode == 0 else f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {args.limit} s"
        told = json.loads(to.read_text()) if to.exists() else {"found": {}}
    return {**told, "ended": ended}


# ---------------------------------------------------------------------------------------- results


def write(path: pathlib.Path, part: str, told: dict[str, Any], hardware: str) -> None:
    """JSON with everything that is known of the device, and a table to read."""
    record = merged(earlier(path), part, told) | {"hardware": hardware}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(table(record)) + "\n")


def earlier(path: pathlib.Path) -> dict[str, Any]:
    """The record of runs before."""
    file = path.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {}


def merged(record: dict[str, Any], part: str, told: dict[str, Any]) -> dict[str, Any]:
    """``record`` with what a part has found; without what is there of another kind of device."""
    device = told.get("device", record.get("device"))
    if record.get("device") not in (None, device):
        print(f"what was measured on {record['device']} is not kept: this is {device}")
        record = {}
    about = where() | {"versions": told.get("versions", {}), "ended": told["ended"]}
    return record | {
        "device": device,
        part: {**record.get(part, {}), **told["found"]},
        "measured": {**record.get("measured", {}), part: about},
    }


def table(record: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = ["# saex on a GPU", "", f"{record['device']}; floors: {record['hardware']}.", ""]
    for part, about in record["measured"].items():
        told = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        ended = f"; {about['ended']}" if about["ended"] else ""
        lines.append(f"- {part}: `{about['command']}`, {about['date']}, {about['machine']}; {told}")
        lines[-1] += ended
    machine = cost.hardware(record["hardware"])
    lines += _steps(record, machine) + _peers(record) + _ops(record, machine)
    for name, answer in record.get("questions", {}).items():
        lines += ["", f"**{name}**: {answer}"]
    return lines


def _steps(record: dict[str, Any], machine: Any) -> list[str]:
    shapes = SHAPES | TINY
    known = [
        name for name in shapes if name in {**record.get("steps", {}), **record.get("peers", {})}
    ]
    lines = [
        "",
        "| shape | b, d, n, k | step | ms | rows/s | x floor |",
        "|---|---|---|---|---|---|",
    ]
    for shape in known:
        b, d, n, k = shapes[shape]
        sae = TopK(d, n, k, matmul_dtype="bfloat16", aux_coefficient=0.0)
        floor = 1e3 * cost.step(sae, b, MeshConfig(), machine).seconds
        times = {**record.get("steps", {}).get(shape, {}), **record.get("peers", {}).get(shape, {})}
        for name, ms in times.items():
            numbers = (
                ("", "") if isinstance(ms, str) else (f"{1e3 * b / ms:,.0f}", f"{ms / floor:.2f}")
            )
            cells = (shape, f"{b}, {d}, {n}, {k}", name, ms, *numbers)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines if known else []


def _peers(record: dict[str, Any]) -> list[str]:
    """Peers' milliseconds over those of saex's step, by default and as its fastest form."""
    lines = ["", f"saex's own step (`{OWN}`) is to take at most {GOAL} x floor; of the peers' time"]
    lines += ["", "| shape | peer | peer / saex | peer / saex's fastest | goal | reached |"]
    rows = [*lines, "|---|---|---|---|---|---|"]
    for shape, peers in record.get("peers", {}).items():
        forms = record.get("steps", {}).get(shape, {})
        own = {name: ms for name, ms in forms.items() if "AuxK" not in name and _is_time(ms)}
        if not _is_time(own.get(OWN)):
            continue
        for name, ms in peers.items():
            if "alone" in name or "pass" in name or not _is_time(ms):
                continue
            ratio, best, goal = ms / own[OWN], ms / min(own.values()), GOALS.get(name)
            told = (f"{goal}x", "yes" if ratio >= goal else "no") if goal else ("", "")
            cells = (shape, name, f"{ratio:.2f}", f"{best:.2f}", *told)
            rows.append(f"| {' | '.join(cells)} |")
    return rows if len(rows) > len(lines) + 1 else []


def _is_time(ms: Any) -> bool:
    """Whether it was measured; what failed says why."""
    return isinstance(ms, float | int)


def floor(op: str, b: int, d: int, n: int, k: int, machine: Any) -> float:
    """Milliseconds that the op takes at least."""
    half, full = "bfloat16", "float32"
    parts = {
        "encode": [("encode", n, k, half)],
        "AuxK": [("decode", n, k, full), ("backward", n, k, full), ("auxk", n // DEAD, k, half)],
        "batch selection": [("above", n, 2 * k, half), ("cut", n, 2 * k, full)],
        "threshold selection": [("above", n, 4 * k, half)],
        "Adam": [("adam", n, k, full)],
    }
    parts = parts.get(op, [(op, n, k, full)])
    return 1e3 * sum(cost.op(name, b, d, *size, machine, dtype) for name, *size, dtype in parts)


def _ops(record: dict[str, Any], machine: Any) -> list[str]:
    lines = ["", "| shape | op | backend | ms | x floor |", "|---|---|---|---|---|"]
    for shape, by_op in record.get("ops", {}).items():
        for op, times in by_op.items():
            least = floor(op, *(SHAPES | TINY)[shape], machine)
            for name, ms in times.items():
                ratio = "" if isinstance(ms, str) else f"{ms / least:.2f}"
                lines.append(f"| {shape} | {op} | {name} | {ms} | {ratio} |")
    return lines if "ops" in record else []


if __name__ == "__main__":
    main()
