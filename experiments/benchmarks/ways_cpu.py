"""From which width on the sparse way pays, for methods whose rows have no fixed number of latents.

    python experiments/benchmarks/ways_cpu.py

A step that looks for what is above, with room for twice the L0, against one that does everything
densely. From which width on the methods do so, and for how many latents of a row they have room
(``encode_above.room_for``), comes from this table. Milliseconds, minimum of interleaved runs in one
process, float32, on rows of features that fire with Zipf frequencies. Beside them the cost model's
floor.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from measure import interleaved, machine, saex_step, step_floor, where, write, zipf_rows

from saex.sae import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU

HERE = pathlib.Path(__file__).resolve().parent


def cut_of(params: Any, sample: Any, sae: Any) -> Any:
    """What ``active`` latents of a row exceed, in the mean, as after training."""
    x = sample["x"][:512] * params["scale"]
    x = x - params["b_dec"]
    return jnp.quantile((x @ params["W_enc"].T).ravel(), 1 - sae.active / sae.n)


@dataclasses.dataclass(frozen=True)
class Jump(JumpReLU):
    """With so many latents a row."""

    active: int = 32

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As JumpReLU, but for the thresholds."""
        params, stats = super().init(key, sample)
        cut = cut_of(params, sample, self)
        return {**params, "log_threshold": jnp.full((self.n,), jnp.log(cut))}, stats


@dataclasses.dataclass(frozen=True)
class Rectified(ReLU):
    """With so many latents a row."""

    active: int = 32

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As ReLU, but for the bias."""
        params, stats = super().init(key, sample)
        return {**params, "b_enc": params["b_enc"] - cut_of(params, sample, self)}, stats


@dataclasses.dataclass(frozen=True)
class Gates(Gated):
    """With so many latents a row."""

    active: int = 32

    def init(self, key: jax.Array, sample: Any) -> tuple[Any, Any]:
        """As Gated, but for the gates' bias."""
        params, stats = super().init(key, sample)
        return {**params, "b_enc": params["b_enc"] - cut_of(params, sample, self)}, stats


METHODS = {
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "jump_relu": Jump,
    "relu": Rectified,
    "gated": Gates,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 8192])
    parser.add_argument("--l0", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(HERE / "results" / "ways_cpu"))
    parser.add_argument("--tiny", action="store_true", help="one small shape: does the code work?")
    args = parser.parse_args()
    if args.tiny:
        args.widths, args.l0, args.d, args.batch, args.rounds = [512], [16], 32, 64, 1
        args.out += "_tiny"
    found = []
    x = zipf_rows(args.batch, args.d)
    for n in args.widths:
        for name in args.only:
            for l0 in args.l0:
                found.append(row(x, name, args.d, n, l0, args.rounds))
                print(found[-1], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record |= {"batch": args.batch, "d": args.d, "constants": machine().describe()}
    write(args.out, record, table(record))


def row(x: Any, name: str, d: int, n: int, l0: int, rounds: int) -> dict[str, Any]:
    """One line of the table, as numbers."""
    calls = {way: saex_step(x, made(name, d, n, l0, way)) for way in ("sparsely", "densely")}
    told = calls["sparsely"]()[1]
    floor = min(step_floor(made(name, d, n, l0, way), len(x)) for way in calls)
    cells = {"n": n, "method": name, "l0": l0, "fell_back": bool(told["fallback"]), "floor": floor}
    return cells | {way: 1e3 * s for way, s in interleaved(calls, rounds).items()}


def made(name: str, d: int, n: int, l0: int, way: str = "sparsely") -> Any:
    """The method with such an L0."""
    own = {"k": l0} if name in ("batch_topk", "matryoshka") else {"active": l0}
    return METHODS[name](d, n, capacity=2 * l0 if way == "sparsely" else 0, **own)


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per width and method."""
    lines = [
        "# Sparsely or densely",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds a step of "
        f"{record['batch']} rows of width {record['d']}, minimum of {record['rounds']} interleaved "
        f"runs; heavy-tailed rows.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| n | L0 | method | sparsely | densely | sparsely / densely | floor | faster / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["milliseconds"]:
        sparse, dense = row["sparsely"], row["densely"]
        cells = row["n"], row["l0"], row["method"], f"{sparse:.1f}", f"{dense:.1f}"
        ratio = "no room" if row["fell_back"] else f"{sparse / dense:.2f}"
        best = f"{row['floor']:.1f}", f"{min(sparse, dense) / row['floor']:.1f}"
        lines.append(f"| {' | '.join(map(str, (*cells, ratio, *best)))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
