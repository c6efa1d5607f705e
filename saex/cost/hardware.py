"""What a machine can do at best: the four numbers a roofline needs, and where they come from."""

import dataclasses
import os
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    Fields:
      flops: matmul FLOP/s by the dtype of the inputs, at JAX's default precision.
      bandwidth: bytes/s to and from memory, reads and writes together.
      memory: bytes of it.
      network: bytes/s that a device sends (and as many receives) along one mesh axis.
      source: where the numbers come from.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    network: float
    source: str

    def describe(self) -> str:
        """The numbers and their source, as a line."""
        rates = ", ".join(
            f"{1e-12 * rate:,.4g} TFLOP/s {name}" for name, rate in self.flops.items()
        )
        memory = f"memory {self.memory / 1e9:,.0f} GB at {self.bandwidth / 1e9:,.4g} GB/s"
        network = f"network {self.network / 1e9:,.4g} GB/s"
        return f"{self.name}: {rates}, {memory}, {network} ({self.source})"


def _tpu(name: str, flops: float, bandwidth: float, memory: float, port: float) -> Hardware:
    # A mesh axis lies on one axis of the torus, where a ring uses two ports of the chip. A float32
    # matmul is one pass of bfloat16 at JAX's default precision.
    rates = {"bfloat16": flops, "float32": flops}
    source = "JAX's TPU table and Cloud TPU documentation; peaks, not measured"
    return Hardware(name, rates, bandwidth, memory, 2 * port, source)


KNOWN = {
    "h200": Hardware(
        "H200",
        {"bfloat16": 790e12, "float32": 395e12},  # float32 by TF32: half of bf16's peak
        4.3e12,
        149e9,
        400e9,
        "bf16 matmul and copy as measured on one; TF32 by ratio of peaks; NVLink bus bandwidth",
    ),
    "v5e": _tpu("TPU v5e", 197e12, 0.82e12, 17.2e9, 50e9),
    "v5p": _tpu("TPU v5p", 459e12, 2.76e12, 103e9, 100e9),
    "v6e": _tpu("TPU v6e", 918e12, 1.64e12, 34.4e9, 100e9),
}
NAMES = (*KNOWN, "cpu")
TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}


def hardware(name: str) -> Hardware:
    """The device of that name; "cpu" is measured here and now, in about a second.

    Raises:
      ValueError: an unknown name.
    """
    if name == "cpu":
        return measure_cpu()
    if name not in KNOWN:
        raise ValueError(f"hardware={name!r}: choose from {', '.join(NAMES)}")
    return KNOWN[name]


def here() -> str:
    """The name of the TPU that JAX computes on (of an unknown one: v5p), else "cpu"."""
    device = jax.devices()[0]
    return TPU_KINDS.get(device.device_kind, "v5p") if device.platform == "tpu" else "cpu"


def measure_cpu() -> Hardware:
    """This machine's CPU: the best of a few matmuls and of a few in-place updates."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        flops = {dtype: _matmul_rate(dtype) for dtype in ("bfloat16", "float32")}
        rate = _stream_rate()
    # devices of one CPU exchange through its memory: one write and one read for a byte sent
    return Hardware("CPU", flops, rate, _physical_memory(), rate / 2, "measured here and now")


def _matmul_rate(dtype: str) -> float:
    m, d, n = 1024, 768, 4096
    x, w = jnp.ones((m, d), dtype), jnp.ones((n, d), dtype)
    product = jax.jit(lambda a, b: jnp.einsum("md,nd->mn", a, b, preferred_element_type="float32"))
    return 2 * m * d * n / _best_time(product, x, w)


def _stream_rate() -> float:
    entries = 2**25  # 128 MiB: larger than any cache
    # Read and written in place, as donated weights are: a fresh array would pay for its pages.
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    held = jnp.zeros(entries)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        held = jax.block_until_ready(add(held))
        best = min(best, time.perf_counter() - start)
    return 2 * 4 * entries / best


def _best_time(fn, *args) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def _physical_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
