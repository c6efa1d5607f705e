"""The CPU backends of the ops, and the whole step, against plain jnp.

    python experiments/benchmarks/ops_cpu.py

"plain" is what one writes without saex: ``lax.top_k``, codes scattered into a dense [b, n] matrix,
dense matmuls, autodiff. "reference" is the definition in ``saex/kernels``, "cpu" the backend that
is used on CPU. Milliseconds, minimum of interleaved runs in one process, float32.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import interleaved, saex_step, where

from saex.kernels.encode_topk import encode_topk, pre_activations
from saex.kernels.sparse_affine import sparse_affine
from saex.kernels.sparse_decode import DECODE, DOTS, SCATTER, sparse_decode
from saex.kernels.sparse_decode.cases import BENCHMARK
from saex.kernels.topk import IMPLS
from saex.sae import TopK

HERE = pathlib.Path(__file__).resolve().parent
HERE_ONLY = ("reference", "cpu")
Calls = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(BENCHMARK), choices=list(BENCHMARK))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", default=str(HERE / "results" / "ops_cpu"))
    args = parser.parse_args()
    found = {}
    for shape in args.shapes:
        found[shape] = {}
        for op, calls in ops(*BENCHMARK[shape]).items():
            times = interleaved(calls(), args.rounds)
            found[shape][op] = {name: round(1e3 * s, 2) for name, s in times.items()}
            print(shape, op, found[shape][op], flush=True)
    record = where() | {"jax": jax.__version__, "rounds": args.rounds, "milliseconds": found}
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(record))


def ops(b: int, d: int, n: int, k: int) -> dict[str, Callable[[], Calls]]:
    """The calls to compare, by op; made when asked for, so that one op's arrays live at a time."""
    return {
        "top_k": lambda: top_k_calls(b, d, n, k),
        "encode": lambda: encode_calls(b, d, n, k),
        "decode": lambda: decode_calls(b, d, n, k),
        "dots": lambda: dots_calls(b, d, n, k),
        "scatter": lambda: scatter_calls(b, d, n, k),
        "top_k + decode": lambda: pair_calls(b, d, n, k),
        "loss and gradients": lambda: gradient_calls(b, d, n, k),
        "train step": lambda: step_calls(b, d, n, k),
    }


# ------------------------------------------------------------------------------------------ the ops


def top_k_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Selection alone."""
    p = _normal(0, b, n)
    calls = {"plain": _call(lambda p: tuple(jax.lax.top_k(p, k)), p)}
    return calls | {"cpu": _call(lambda p: IMPLS["cpu"](p, k), p)}


def encode_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder and selection, without gradients."""
    x, w = _normal(0, b, d), _weights(d, n)

    def plain(x, w):
        return jax.lax.top_k(pre_activations(x, w["b_dec"], w["W_enc"], w["b_enc"]), k)

    def ours(x, w):
        return encode_topk(x, w["b_dec"], w["W_enc"], w["b_enc"], k)

    return {"plain": _call(plain, x, w), "cpu": _call(ours, x, w)}


def decode_calls(b: int, d: int, n: int, k: int) -> Calls:
    """[b, k] codes to [b, d] rows."""
    values, indices, W = _normal(0, b, k), _indices(b, n, k), _normal(1, n, d)
    calls = {"plain": _call(lambda v, i, W: _dense(v, i, n) @ W, values, indices, W)}
    return calls | {
        name: _call(f, values, indices, W) for name, f in DECODE.items() if name in HERE_ONLY
    }


def dots_calls(b: int, d: int, n: int, k: int) -> Calls:
    """The gradient of the values."""
    indices, g, W = _indices(b, n, k), _normal(0, b, d), _normal(1, n, d)
    plain = _call(lambda i, g, W: jnp.take_along_axis(g @ W.T, i, axis=1), indices, g, W)
    return {"plain": plain} | {
        name: _call(f, indices, g, W) for name, f in DOTS.items() if name in HERE_ONLY
    }


def scatter_calls(b: int, d: int, n: int, k: int) -> Calls:
    """The gradient of the rows."""
    values, indices, g = _normal(0, b, k), _indices(b, n, k), _normal(1, b, d)
    calls = {"plain": _call(lambda v, i, g: _dense(v, i, n).T @ g, values, indices, g)}
    for name, f in ((i, SCATTER[i]) for i in HERE_ONLY):
        calls[name] = _call(lambda v, i, g, f=f: f(v, i, g, n), values, indices, g)
    return calls


def pair_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Selection and decode as one program: what an evaluation does after the encoder's matmul."""
    p, W = _normal(0, b, n), _normal(1, n, d)

    def plain(p, W):
        values, indices = jax.lax.top_k(p, k)
        return _dense(jax.nn.relu(values), indices, n) @ W

    def ours(p, W):
        values, indices = IMPLS["cpu"](p, k)
        return sparse_decode(jax.nn.relu(values), indices, W, "cpu")

    return {"plain": _call(plain, p, W), "cpu": _call(ours, p, W)}


def gradient_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Mean squared error of a TopK SAE and its gradients in all four weights."""
    x, weights = _normal(0, b, d), _weights(d, n)

    def ours(w, x):
        held = jax.lax.stop_gradient(w)
        values, indices = encode_topk(x, held["b_dec"], held["W_enc"], held["b_enc"], k)
        arrays = (x, w["b_dec"], w["W_enc"], w["b_enc"], w["W_dec"])
        _, y = sparse_affine(*arrays, jax.nn.relu(values), indices)
        return jnp.mean(jnp.square(x - y - w["b_dec"][None]))

    return {
        "plain": _call(jax.value_and_grad(lambda w, x: _plain_loss(w, x, k)), weights, x),
        "cpu": _call(jax.value_and_grad(ours), weights, x),
    }


def step_calls(b: int, d: int, n: int, k: int) -> Calls:
    """A whole update: saex's, with AuxK (nothing dead), firing counts and unit rows, against
    loss, gradients, optax.adam and unit rows.
    """
    x = _normal(0, b, d)
    return {
        "plain": _plain_step(x, n, k),
        "cpu": saex_step(np.asarray(x), TopK(x.shape[1], n, k=k)),
    }


def _plain_step(x: jax.Array, n: int, k: int) -> Callable[[], Any]:
    tx = optax.adam(1e-4)

    def step(weights, opt_state, x):
        loss, grads = jax.value_and_grad(lambda w: _plain_loss(w, x, k))(weights)
        updates, opt_state = tx.update(grads, opt_state)
        weights = optax.apply_updates(weights, updates)
        W = weights["W_dec"]
        norms = jnp.linalg.norm(W, axis=1, keepdims=True)
        return {**weights, "W_dec": W / norms}, opt_state, loss

    weights = _weights(x.shape[1], n)
    state = [weights, tx.init(weights), None]
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def call():
        state[:] = compiled(state[0], state[1], x)
        return state

    return call


# ----------------------------------------------------------------------------------------- the rest


def _plain_loss(w: dict[str, jax.Array], x: jax.Array, k: int) -> jax.Array:
    p = pre_activations(x, w["b_dec"], w["W_enc"], w["b_enc"])
    values, indices = jax.lax.top_k(p, k)
    y = _dense(jax.nn.relu(values), indices, p.shape[1]) @ w["W_dec"] + w["b_dec"][None]
    return jnp.mean(jnp.square(x - y))


def _dense(values: jax.Array, indices: jax.Array, n: int) -> jax.Array:
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], n)).at[rows, indices].set(values)


def _call(f: Callable, *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(f)
    return lambda: compiled(*args)


def _weights(d: int, n: int) -> dict[str, jax.Array]:
    W = _normal(7, n, d) / d**0.5
    return {"W_enc": W, "W_dec": W + 0, "b_enc": jnp.zeros(n), "b_dec": jnp.zeros(d)}


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _indices(b: int, n: int, k: int) -> jax.Array:
    """k distinct latents a row, as a selection gives them."""
    return jax.jit(lambda p: jax.lax.top_k(p, k)[1])(_normal(5, b, n))


def table(record: dict[str, Any]) -> str:
    """Markdown: one row per shape and op."""
    lines = [
        "# Ops on CPU against plain jnp",
        "",
        f"`{record['command']}`  ",
        f"{record['date']}, {record['machine']}, jax {record['jax']}; milliseconds, minimum of "
        f"{record['rounds']} interleaved runs.",
        "",
        "| shape | b, d, n, k | op | plain | reference | cpu | plain / cpu |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, by_op in record["milliseconds"].items():
        size = ", ".join(map(str, BENCHMARK[shape]))
        for op, ms in by_op.items():
            reference = ms.get("reference", "")
            ratio = ms["plain"] / ms["cpu"]
            lines.append(
                f"| {shape} | {size} | {op} | {ms['plain']} | {reference} | {ms['cpu']} | "
                f"{ratio:.2f} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
