"""What could only be guessed without a GPU: each question has a function that answers it.

A function takes (clock, tiny) and returns what goes into the record; ``tiny``: small shapes, to see
that the code works.
"""

import collections
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import zipf_codes, zipf_scores

from saex.kernels import csc, sparse_decode, topk

Answer = dict[str, Any]


def scatter_by_atomics(clock, tiny: bool) -> Answer:
    """Does XLA's scatter-add of floats compile to an atomic add, or to a loop of compare-and-swap?

    Milliseconds with Zipf-distributed and with equal targets say what contention costs.
    """
    m, n, d = (64, 32, 8) if tiny else (131072, 24576, 768)
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, n + 1)
    zipf = jnp.asarray(rng.choice(n, m, p=weights / weights.sum()), jnp.int32)
    add = lambda i, rows: jnp.zeros((n, d)).at[i].add(rows)  # noqa: E731
    rows = jax.random.normal(jax.random.key(0), (m, d))
    return {
        "instructions": instructions(add, zipf, rows),
        "ms, Zipf": clock(_call(add, zipf, rows)),
        "ms, spread": clock(_call(add, jnp.arange(m, dtype=jnp.int32) % n, rows)),
        "ms, one target": clock(_call(add, jnp.zeros_like(zipf), rows)),
    }


def instructions(f, *args) -> str:
    """Which atomic instructions the compiled program has, from its PTX."""
    with tempfile.TemporaryDirectory() as folder:
        jax.jit(f).lower(*args).compile(compiler_options={"xla_dump_to": folder})
        text = "".join(p.read_text() for p in pathlib.Path(folder).glob("*.ptx"))
    if not text:
        return "no PTX was dumped"
    found = collections.Counter(re.findall(r"\b(?:atom|red)\.[.\w]+", text))
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common()) or "no atomics"


# By JAX's version XLA has the one or the other: RAFT's selection in the place of a stable sort.
RAFT = (
    "xla_gpu_experimental_use_raft_select_k",
    "xla_gpu_experimental_enable_raft_for_stable_topk",
)


def selections(clock, tiny: bool) -> Answer:
    """lax.top_k (stable: a sort for k > 16; unstable: RAFT's selection) against two levels."""
    shapes = [(8, 512, 4)] if tiny else [(8192, n, k) for n in (512, 2048, 32768) for k in (32, 64)]
    found = {}
    for b, n, k in shapes:
        p = jnp.asarray(zipf_scores(min(b, 1024), n))
        p = jnp.tile(p, (b // len(p), 1))
        stable = lambda p, k=k: tuple(jax.lax.top_k(p, k))  # noqa: E731
        calls = {
            "stable": _call(stable, p),
            "two levels": _call(lambda p, k=k: topk.IMPLS["gpu"](p, k), p),
            # refused by JAX 0.10, which has no such argument
            "unstable": _call(lambda p, k=k: tuple(jax.lax.top_k(p, k, is_stable=False)), p),
        }
        calls |= {f"stable, {flag}": _call(stable, p, options={flag: True}) for flag in RAFT}
        found[f"{b}, {n}, k={k}"] = {name: clock(call) for name, call in calls.items()}
    return found


def decode_fusion(clock, tiny: bool) -> Answer:
    """Does XLA fuse the gather of rows into their weighted sum, or write [b, k, d] between them?

    By the compiled program: fusions that hold both a gather and a reduction, gathers that are left
    alone, and temporary memory in parts of a [b, k, d] of floats. GB/s of the gathered rows.
    """
    b, k, d, n = (8, 4, 128, 256) if tiny else (8192, 32, 768, 32768)
    values, indices = map(jnp.asarray, zipf_codes(b, n, k))
    W = jax.random.normal(jax.random.key(1), (n, d))
    forms = {
        "einsum": lambda v, i, W: jnp.einsum("bk,bkd->bd", v, W[i]),
        "multiply, sum": lambda v, i, W: jnp.sum(v[:, :, None] * W[i], axis=1),
        "gpu": sparse_decode.DECODE["gpu"],
    }
    found = {}
    for name, f in forms.items():
        program = jax.jit(f).lower(values, indices, W).compile()
        fused, alone = gathers(program.as_text())
        ms = clock(_call(f, values, indices, W))
        found[name] = {
            "fused with a sum": fused,
            "gathers without": alone,
            "temporary / [b, k, d]": round(
                program.memory_analysis().temp_size_in_bytes / (4 * b * k * d), 3
            ),
            "GB/s": ms if isinstance(ms, str) else round(4 * b * k * d / ms / 1e6),
        }
    return found


def gathers(text: str) -> tuple[int, int]:
    """(computations of a compiled text with gather and reduction, those with a gather alone)."""
    blocks = re.split(r"\n\n+", text)
    with_gather = [block for block in blocks if re.search(r" gather\(", block)]
    both = [block for block in with_gather if re.search(r" (reduce|dot)\(", block)]
    return len(both), len(with_gather) - len(both)


def decode_in_cache_and_out(clock, tiny: bool) -> Answer:
    """GB/s of gathered rows, from a table that fits the L2 cache and from one that does not."""
    b, k, d = (8, 4, 128) if tiny else (8192, 32, 768)
    found = {}
    for n in (256, 512) if tiny else (8192, 131072):
        values, indices = map(jnp.asarray, zipf_codes(b, n, k))
        rows = jax.random.normal(jax.random.key(1), (n, d))
        for name in ("gpu", "pallas_gpu"):
            ms = clock(_call(sparse_decode.DECODE[name], values, indices, rows))
            rate = ms if isinstance(ms, str) else round(4 * b * k * d / ms / 1e6)
            found[f"{name}, table of {4e-6 * n * d:.0f} MB"] = rate
    return found


def matmuls(clock, tiny: bool) -> Answer:
    """TFLOP/s of bf16 matmuls: XLA's, and the one with the groups' maxima in its epilogue."""
    from saex.kernels.encode_topk import pallas_gpu

    found = {}
    for b, d, n in [(128, 64, 512)] if tiny else [(8192, 768, 32768), (8192, 4096, 131072)]:
        x, W = (jnp.ones(s, jnp.bfloat16) for s in ((b, d), (d, n)))
        bias, flops = jnp.zeros(n), 2 * b * d * n
        calls = {
            "XLA, f32 out": _call(lambda x, W: matmul(x, W.T), x, W),
            "XLA, bf16 out": _call(lambda x, W: x @ W, x, W),
        }
        if not tiny:
            calls["with maxima"] = _call(lambda *a: pallas_gpu.scores(*a, 32), x, W, bias)
        times = {name: clock(call) for name, call in calls.items()}
        rate = lambda ms, f=flops: ms if isinstance(ms, str) else round(f / ms / 1e9, 1)  # noqa: E731
        found[f"{b}, {d}, {n}"] = {name: rate(ms) for name, ms in times.items()}
    return found


def matmul(x: jax.Array, W: jax.Array) -> jax.Array:
    """x W^T with bf16 inputs and float32 out."""
    x, W = x.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    return jnp.einsum("bd,nd->bn", x, W, preferred_element_type=jnp.float32)


def sorts(clock, tiny: bool) -> Answer:
    """Milliseconds to sort the slots by latent."""
    found = {}
    for m in (256,) if tiny else (2**18, 2**19, 2**21):
        indices = jnp.asarray(zipf_codes(m // 32, 32768, 32)[1])
        used = jnp.ones(indices.shape, bool)
        found[f"{m} slots"] = clock(_call(lambda u, i: csc.sort_slots(u, i, 32768), used, indices))
    return found


def copies(clock, tiny: bool) -> Answer:
    """GB/s on the device, and from the host: pageable memory and pinned memory."""
    host = np.ones((2**10 if tiny else 2**26,), np.float32)  # 256 MiB
    device = jax.devices()[0]
    here = jax.device_put(host, device)
    calls = {
        "on the device (read and write)": (_call(lambda a: a + 1, here), 2),
        "from pageable memory": (lambda: jax.device_put(host, device), 1),
    }
    try:
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        there = jax.device_put(host, pinned)
        to = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        calls["from pinned memory"] = (lambda: jax.device_put(there, to), 1)
    except ValueError:
        pass  # not on this platform
    found = {}
    for name, (call, times) in calls.items():
        ms = clock(call)
        found[name] = ms if isinstance(ms, str) else round(times * host.nbytes / ms / 1e6, 1)
    return found


def _call(f, *args, options=None):
    compiled = jax.jit(f, compiler_options=options)
    return lambda: compiled(*args)


ALL = {
    "scatter-add: atomics or compare-and-swap": scatter_by_atomics,
    "selections, ms": selections,
    "decode: gather and sum in one fusion": decode_fusion,
    "gathers, GB/s": decode_in_cache_and_out,
    "bf16 matmuls, TFLOP/s": matmuls,
    "sort of the slots, ms": sorts,
    "copies, GB/s": copies,
}
