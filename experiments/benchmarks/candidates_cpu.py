"""From which width on candidates pay, for methods whose rows have no fixed number of latents.

    python experiments/benchmarks/candidates_cpu.py

A step with so many candidates a row against one that does everything densely, at an L0 of 32. From
which width on the methods ask for candidates (``selection.candidates``), and for how many (8 k of a
batch's top k; 256 of what is above thresholds or 0, whose L0 is not known), comes from this table.
Milliseconds, minimum of interleaved runs in one process, float32, on rows of features that fire
with Zipf frequencies. Beside them the cost model's floor of the fastest way on this machine.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from measure import interleaved, machine, saex_step, step_floor, where, write, zipf_rows

from saex.sae import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU

HERE = pathlib.Path(__file__).resolve().parent
K, CAPACITIES = 32, (128, 256, 0)


def cut_of(params: Any, sample: Any, n: int) -> Any:
    """The pre-activation that K latents of a row exceed, in the mean, as after some training."""
    x = sample["x"][:512] * params["scale"]
    x = x - params["b_dec"]
    return jnp.quantile((x @ params["W_enc"].T).ravel(), 1 - K / n)


class Jump(JumpReLU):
    """With K latents a row."""

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As JumpReLU, but for the thresholds."""
        params, stats = super().init(key, sample)
        cut = cut_of(params, sample, self.n)
        return {**params, "log_threshold": jnp.full((self.n,), jnp.log(cut))}, stats


class Rectified(ReLU):
    """With K latents a row."""

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As ReLU, but for the bias."""
        params, stats = super().init(key, sample)
        return {**params, "b_enc": params["b_enc"] - cut_of(params, sample, self.n)}, stats


class Gates(Gated):
    """With K latents a row."""

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As Gated, but for the gates' bias."""
        params, stats = super().init(key, sample)
        return {**params, "b_enc": params["b_enc"] - cut_of(params, sample, self.n)}, stats


METHODS = {
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "jump_relu": Jump,
    "relu": Rectified,
    "gated": Gates,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048, 4096, 8192, 16384])
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(HERE / "results" / "candidates_cpu"))
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    args = parser.parse_args()
    if args.tiny:
        args.widths, args.d, args.batch, args.rounds = [512], 32, 64, 1
        args.out += "_tiny"
    found = []
    x = zipf_rows(args.batch, args.d)
    for n in args.widths:
        for name in METHODS:
            of = [c for c in CAPACITIES if c < n]
            calls = {str(c): saex_step(x, made(name, args.d, n, c)) for c in of}
            told = {c: call()[1] for c, call in calls.items()}
            wide = {c: round(float(m.get("wide_rows", 0)), 4) for c, m in told.items()}
            times = interleaved(calls, args.rounds)
            floors = [step_floor(made(name, args.d, n, c), args.batch) for c in of]
            row = {"n": n, "method": name, "wide_rows": wide, "floor": round(min(floors), 3)}
            found.append({**row, **{c: round(1e3 * s, 1) for c, s in times.items()}})
            print(found[-1], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record |= {"batch": args.batch, "d": args.d, "constants": machine().describe()}
    write(args.out, record, table(record))


def made(name: str, d: int, n: int, capacity: int) -> Any:
    """The method with an L0 of K."""
    own = {"k": K} if name in ("batch_topk", "matryoshka") else {}
    return METHODS[name](d, n, capacity=capacity, **own)


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per width and method."""
    lines = [
        "# Candidates or everything densely",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds a step of "
        f"{record['batch']} rows of width {record['d']} at L0 {K}, minimum of {record['rounds']} "
        f"interleaved runs; heavy-tailed rows.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| n | method | 128 candidates | 256 candidates | densely | faster / densely | floor | "
        "faster / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["milliseconds"]:
        few = [_cell(row, str(c)) for c in CAPACITIES]
        best, dense = min(row[str(c)] for c in CAPACITIES if str(c) in row), row["0"]
        cells = (row["n"], row["method"], *few, f"{best / dense:.2f}", row["floor"])
        lines.append(f"| {' | '.join(map(str, cells))} | {best / row['floor']:.2f} |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any], capacity: str) -> str:
    share = row["wide_rows"].get(capacity, 0)
    told = "" if not share else " (all rows densely)" if share == 1 else f" ({share:.1%} wide)"
    return f"{row[capacity]}{told}" if capacity in row else ""


if __name__ == "__main__":
    main()
