"""Eight dictionaries in one step against eight steps: what a stack costs on CPU.

    python experiments/benchmarks/stack_cpu.py --store=runs/quickstart/store

The shared part is a batch from the stream; a member's own part is its step. Milliseconds, minimum
of interleaved rounds: one member, eight in one program, the batch, and both ends to ends; beside
them the cost model's floor of eight on this machine, and eight in the other layouts that one
program can have: states stacked, in a step that is vmapped over them, or in a loop of single steps.
Encoders side by side in one matrix would only change the encoders' product, so that is measured by
itself: eight products in one program, and one with the concatenated matrix.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import machine, step_floor, where, write

from saex.data.store import Store
from saex.data.stream import Stream
from saex.sae import TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train import stack
from saex.train.optim import Optim
from saex.train.state import init_state
from saex.train.step import hyper_arrays, update

HERE = pathlib.Path(__file__).resolve().parent
MEMBERS = 8
OTHERS = {  # layouts beside the one that saex has, and what makes of one member's step all members'
    "eight, one vmap": lambda one: jax.vmap(one, in_axes=(0, None, 0, 0)),
    "eight, in a loop": lambda one: (
        lambda states, batch, *rest: jax.lax.map(
            lambda member: one(member[0], batch, *member[1:]), (states, *rest)
        )
    ),
}
PRODUCTS = ("eight encoder products", "one, concatenated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="a folder with train and heldout")
    parser.add_argument("--site", default="blocks.1.resid_post")
    parser.add_argument("--n", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=str(HERE / "results" / "stack_cpu"))
    args = parser.parse_args()
    store = Store.open(pathlib.Path(args.store) / "train")
    found = {n: measure(store, args.site, n, args.rounds) for n in args.n}
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    record["constants"] = machine().describe()
    write(args.out, record, table(record))
    print(table(record))


def measure(store: Store, site: str, n: int, rounds: int) -> dict[str, float]:
    """Milliseconds by name."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        stream = Stream(threads=0).open(store, {"x": site}, 0, mesh)
        numbers = iter(range(10**9))
        one, eight = (stepper(mesh, stream, n, count) for count in (1, MEMBERS))
        others = {name: stacked(mesh, stream, n, layout) for name, layout in OTHERS.items()}
        batch = stream.batch_at(0)

        def fetch():
            return stream.batch_at(next(numbers))

        calls: dict[str, Callable[[], Any]] = {
            "one": lambda: one(batch),
            "eight": lambda: eight(batch),
            "batch": fetch,
            "batch and one": lambda: one(fetch()),
            "batch and eight": lambda: eight(fetch()),
        }
        calls |= {name: lambda step=step: step(batch) for name, step in others.items()}
        calls |= products(batch["x"], n)
        times = dict.fromkeys(calls, float("inf"))
        for i in range(rounds + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                jax.block_until_ready(call())
                if i:
                    times[name] = min(times[name], 1e3 * (time.perf_counter() - started))
        stream.close()
    found = {name: round(t, 1) for name, t in times.items()}
    sae = TopK(d_in=batch["x"].shape[1], n=n, k=32)
    rows = batch["x"].shape[0]
    return {**found, "floor of eight": round(step_floor(sae, rows, members=MEMBERS), 2)}


def products(x: jax.Array, n: int) -> dict[str, Callable]:
    """What the encoders multiply, [b, MEMBERS, n] together, apart and side by side; the weights lie
    as each layout would keep them from step to step.
    """
    rows = jnp.asarray(x, jnp.float32)
    apart = list(jax.random.normal(jax.random.key(0), (MEMBERS, rows.shape[1], n)))
    beside = jnp.concatenate(apart, axis=1)
    eight, one = jax.jit(lambda x, weights: [x @ w for w in weights]), jax.jit(jnp.matmul)
    return {
        PRODUCTS[0]: lambda: eight(rows, apart),
        PRODUCTS[1]: lambda: one(rows, beside),
    }


def members(mesh: Any, stream: Any, n: int, count: int) -> tuple[Any, Any, list[tuple]]:
    """(sae, optim, one (state, key, hyper) a member)."""
    sample = {"x": np.asarray(stream.sample(4096)["x"], np.float32)}
    sae, optim = TopK(d_in=sample["x"].shape[1], n=n, k=32), Optim()

    def member(m):
        key = jax.random.key(m)
        state = init_state(sae, optim.transformation(), key, sample, mesh, "tp")
        return state, key, hyper_arrays(sae, optim, 1000)

    return sae, optim, [member(m) for m in range(count)]


def stepper(mesh: Any, stream: Any, n: int, count: int) -> Callable:
    """A function of a batch that takes one step of ``count`` members, as saex does."""
    sae, optim, all_of = members(mesh, stream, n, count)
    slots, keys, hypers = (stack.join(part, mesh) for part in zip(*all_of))
    return stepping(stack.make_stack_step(sae, optim, 1000), slots, keys, hypers)


def stacked(mesh: Any, stream: Any, n: int, layout: Callable) -> Callable:
    """The same of ``MEMBERS`` members whose arrays have a leading axis of members."""
    sae, optim, all_of = members(mesh, stream, n, MEMBERS)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_of)
    step = jax.jit(layout(update(sae, optim, 1000)), donate_argnums=0)
    return stepping(step, *states)


def stepping(step: Callable, state: Any, keys: Any, hypers: Any) -> Callable:
    """A function of a batch that goes one step on."""
    kept = [state]

    def call(batch):
        kept[0], out = step(kept[0], batch, keys, hypers)
        return kept[0], out

    return call


def table(record: dict[str, Any]) -> str:
    """Markdown: one row per width."""
    beside = [*OTHERS, *PRODUCTS]
    lines = [
        "# Eight dictionaries in one step",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds, minimum of "
        f"{record['rounds']} interleaved rounds; TopK, k 32, 4096 rows of width 256.  ",
        f"Constants of the floor: {record['constants']}.",
        "",
        "| n | batch | one | eight | eight / (8 one) | (batch + eight) / (batch + 8 one) | "
        "8 (batch and one) / (batch and eight) | floor of eight | eight / floor | "
        + " | ".join(beside)
        + " |",
        "|" + "---|" * (9 + len(beside)),
    ]
    for n, t in record["milliseconds"].items():
        parts = t["batch"] + MEMBERS * t["one"]
        lines.append(
            f"| {n} | {t['batch']} | {t['one']} | {t['eight']} | "
            f"{t['eight'] / MEMBERS / t['one']:.3f} | {t['batch and eight'] / parts:.3f} | "
            f"{MEMBERS * t['batch and one'] / t['batch and eight']:.2f} | "
            f"{t['floor of eight']} | {t['eight'] / t['floor of eight']:.2f} | "
            + " | ".join(str(t[name]) for name in beside)
            + " |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
