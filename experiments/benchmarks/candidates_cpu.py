"""From which width on candidates pay, for methods whose rows have no fixed number of latents.

    python experiments/benchmarks/candidates_cpu.py

A step with the usual number of candidates a row (8 k of a batch's top k; 256 above thresholds)
against one that does everything densely, at an L0 of 32. From which width on the methods ask for
candidates (``selection.candidates``) comes from this table. Milliseconds, minimum of interleaved
runs in one process, float32, on rows (of norm 1) of features that fire with Zipf frequencies.
Beside them the cost model's floor of the faster way on this machine.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import interleaved, machine, saex_step, step_floor, where, write, zipf_rows

from saex.sae import BatchTopK, JumpReLU, Matryoshka

HERE = pathlib.Path(__file__).resolve().parent
K, USUAL = 32, 256


class Jump(JumpReLU):
    """With thresholds that leave K latents a row, as after a while of training."""

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As JumpReLU."""
        params, stats = super().init(key, sample)
        x = sample["x"][:512] * params["scale"] - params["b_dec"]
        cut = jnp.quantile((x @ params["W_enc"].T).ravel(), 1 - K / self.n)
        return {**params, "log_threshold": jnp.full((self.n,), jnp.log(cut))}, stats


METHODS = {"batch_topk": BatchTopK, "matryoshka": Matryoshka, "jump_relu": Jump}


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
    # of random weights a long row has more active latents than there are candidates
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for n in args.widths:
        for name in METHODS:
            calls = {c: saex_step(x, made(name, args.d, n, c)) for c in (USUAL, 0)}
            fallback = float(calls[USUAL]()[1]["fallback"])
            times = interleaved({str(c): call for c, call in calls.items()}, args.rounds)
            row = {"n": n, "method": name, "fallback": fallback}
            floors = [step_floor(made(name, args.d, n, c), args.batch) for c in (USUAL, 0)]
            row["floor"] = round(min(floors), 3)
            found.append({**row, **{c: round(1e3 * s, 1) for c, s in times.items()}})
            print(found[-1], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record |= {"batch": args.batch, "d": args.d, "constants": machine().describe()}
    write(args.out, record, table(record))


def made(name: str, d: int, n: int, capacity: int) -> Any:
    """The method with an L0 of K."""
    own = {"bandwidth": 1e-3} if name == "jump_relu" else {"k": K}
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
        f"| n | n / candidates | method | {USUAL} candidates a row | densely | ratio | floor | "
        "faster / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["milliseconds"]:
        some, dense = row[str(USUAL)], row["0"]
        told = f"{some} (fell back)" if row["fallback"] else f"{some}"
        cells = (row["n"], row["n"] // USUAL, row["method"], told, dense, f"{some / dense:.2f}")
        cells += (row["floor"], f"{min(some, dense) / row['floor']:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
