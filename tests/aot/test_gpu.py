"""The GPU backends, and the whole step, go through the CUDA compiler for an H100.

Nothing runs. What is checked: that it compiles to machine code, what is sorted and scattered, and
temporary memory. Needs the CUDA plugin of JAX, no NVIDIA library:

    pip install --no-deps jax-cuda12-plugin==<jax's version> jax-cuda12-pjrt==<jax's version>
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from saex.kernels import encode_topk, sparse_affine, sparse_decode
from saex.kernels.topk import xla_gpu as topk_xla
from saex.sae.jump_relu import JumpReLU
from saex.sae.topk import TopK
from saex.sharding import MeshConfig
from tests.aot.test_collectives import check_bytes
from tests.compiled import train_step

pytestmark = pytest.mark.aot

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84929347584
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# (rows, d, n, k): the usual one, and a width that strains the registers
SHAPES = {"B": (8192, 768, 32768, 32), "E": (8192, 4096, 131072, 64)}
MOSAIC = 'custom_call_target="mosaic_gpu'
MIB = 2**20


@pytest.fixture(scope="module")
def mesh():
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("no CUDA compiler: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt")
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    devices = np.array(topology.devices).reshape(1, 1)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def compiled(mesh, f, *shapes, dtypes=()):
    """f compiled for one H100."""
    dtypes = [*dtypes, *(["float32"] * (len(shapes) - len(dtypes)))]
    where = jax.NamedSharding(mesh, jax.P())
    args = [jax.ShapeDtypeStruct(s, t, sharding=where) for s, t in zip(shapes, dtypes)]
    with jax.set_mesh(mesh):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).compile()


def sorted_widths(program):
    """The lengths of what is sorted row by row."""
    return [
        int(width)
        for line in program.as_text().splitlines()
        if " sort(" in line
        for width in re.findall(r"= \(?\w+\[\d+,(\d+)\]", line)
    ]


def float_scatters(program):
    """Scatters of floats: atomics, whose order is not fixed."""
    lines = program.as_text().splitlines()
    return [line for line in lines if re.search(r"= \(?(f32|bf16)\[.* scatter\(", line)]


def temp(program):
    return program.memory_analysis().temp_size_in_bytes


# ------------------------------------------------------------------------------------- XLA's forms


@pytest.mark.parametrize("b, n, k", [(4096, 24576, 32), (8192, 131072, 64), (256, 1_000_000, 256)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_k_sorts_no_row_of_scores(mesh, b, n, k, dtype):
    program = compiled(mesh, lambda s: topk_xla.top_k(s, k), (b, n), dtypes=(dtype,))
    assert sorted_widths(program) and max(sorted_widths(program)) <= max(2048, 8 * k)
    assert temp(program) < b * n * jnp.dtype(dtype).itemsize / 2  # no copy of the scores


def test_the_check_of_sorts_can_fail(mesh):
    program = compiled(mesh, lambda s: jax.lax.top_k(s, 32), (64, 8192))
    assert max(sorted_widths(program)) == 8192


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_topk_holds_the_scores_once(mesh, dtype):
    b, d, n, k = SHAPES["B"]
    encode = encode_topk.IMPLS["gpu"]
    shapes = (b, d), (d,), (n, d), (n,)
    program = compiled(mesh, lambda *args: encode(*args, k, dtype), *shapes)
    assert max(sorted_widths(program)) <= 2048
    assert temp(program) < 1.2 * 4 * b * n + 4 * (b + n) * d


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_products_hold_no_row_per_slot(mesh, shape):
    b, d, n, k = SHAPES[shape]
    decode, dots = sparse_decode.DECODE["gpu"], sparse_decode.DOTS["gpu"]
    room = 2 * 4 * b * d + 4 * 4 * b * k  # of b * k * d floats it would be 4 * b * k * d
    program = compiled(mesh, decode, (b, k), (b, k), (n, d), dtypes=("float32", "int32"))
    assert temp(program) <= room
    program = compiled(mesh, dots, (b, k), (b, d), (n, d), dtypes=("int32",))
    assert temp(program) <= room


def grads_of(mesh, backend, shape):
    b, d, n, k = SHAPES[shape]
    dtypes = "float32", "float32", "int32"
    shapes = (b, k), (b, k), (b, k), (b, d), (b, d), (n, d)
    return compiled(mesh, sparse_affine.GRADS[backend], *shapes, dtypes=dtypes)


def test_backward_pass_has_no_scatter_and_one_sort_of_the_slots(mesh):
    b, d, _, k = SHAPES["B"]
    program = grads_of(mesh, "gpu", "B")
    assert not float_scatters(program)
    assert not sorted_widths(program)  # the slots are sorted as one row
    # two widths of sums of pieces of at least 8 slots, and tables of a few numbers a slot
    assert temp(program) < 1.2 * (2 * 4 * b * k * d / 8) + 16 * 4 * b * k


# ----------------------------------------------------------------------------- kernels for Hopper


@pytest.mark.parametrize("shape", SHAPES)
def test_hopper_decode_and_dots(mesh, shape):
    b, d, n, k = SHAPES[shape]
    decode, dots = sparse_decode.DECODE["pallas_gpu"], sparse_decode.DOTS["pallas_gpu"]
    program = compiled(mesh, decode, (b, k), (b, k), (n, d), dtypes=("float32", "int32"))
    assert MOSAIC in program.as_text() and temp(program) <= MIB
    program = compiled(mesh, dots, (b, k), (b, d), (n, d), dtypes=("int32",))
    assert MOSAIC in program.as_text() and temp(program) <= MIB


@pytest.mark.parametrize("shape", SHAPES)
def test_hopper_backward_pass(mesh, shape):
    b, d, n, k = SHAPES[shape]
    program = grads_of(mesh, "pallas_gpu", shape)
    assert program.as_text().count(MOSAIC) == 2  # what hot latents have beyond a piece; the rest
    assert not float_scatters(program)
    # two rows of sums for each 128 slots, and tables of a few numbers a slot and a latent
    assert temp(program) < 1.2 * (2 * 4 * d * b * k / 128) + 4 * (8 * b * k + 8 * n)


def test_hopper_scatter(mesh):
    b, d, n, k = SHAPES["B"]
    scatter = sparse_decode.SCATTER["pallas_gpu"]
    shapes, dtypes = ((b, k), (b, k), (b, d)), ("float32", "int32")
    program = compiled(mesh, lambda v, i, g: scatter(v, i, g, n), *shapes, dtypes=dtypes)
    assert program.as_text().count(MOSAIC) == 2 and not float_scatters(program)


@pytest.mark.parametrize("b, d, n, k", [SHAPES["B"], (4096, 1024, 65536, 64), (100, 70, 1000, 200)])
def test_hopper_encode_topk(mesh, b, d, n, k):
    encode = encode_topk.IMPLS["pallas_gpu"]
    shapes = (b, d), (d,), (n, d), (n,)
    program = compiled(mesh, lambda *args: encode(*args, k, "bfloat16"), *shapes)
    assert program.as_text().count(MOSAIC) == 1
    assert max(sorted_widths(program)) <= 2048
    assert temp(program) < 1.2 * 4 * (b + 128) * (n + 256) + 4 * (b + n + 512) * (d + 64)


# --------------------------------------------------------------------------------- the whole step


@pytest.mark.parametrize("backend", ["gpu", "pallas_gpu"])
def test_training_step(mesh, backend, monkeypatch):
    for table in (
        sparse_affine.GRADS,
        encode_topk.IMPLS,
        sparse_decode.DECODE,
        sparse_decode.DOTS,
        sparse_decode.SCATTER,
    ):
        monkeypatch.setitem(table, "gpu", table[backend])
    jax.clear_caches()  # the loss of an equal dictionary was traced with the other backends
    rows, n, d, k = 1024, 16384, 256, 32
    sae = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16")
    program = train_step(sae, rows, MeshConfig(), mesh, "cuda")
    assert (MOSAIC in program.as_text()) == (backend == "pallas_gpu")
    assert n not in sorted_widths(program)
    # only AuxK's loop has some: it adds blocks of dead latents to their rows, where there are any
    assert not [line for line in float_scatters(program) if "while/body/" not in line]
    assert temp(program) < 2 * 4 * rows * n + 5 * 4 * n * d


@pytest.mark.slow  # what is lowered is looked at in tests/kernels/test_lowering.py
def test_jump_relu_step_scatters_no_floats(mesh):
    """Its thresholds and its encoder's bias are sums over slots."""
    sae = JumpReLU(256, 16384, capacity=32)
    program = train_step(sae, 1024, MeshConfig(), mesh, "cuda")
    assert " conditional(" in program.as_text()  # sparsely, and the way out
    assert not float_scatters(program)


def test_training_step_of_four_devices(mesh):
    """Latents over two, rows over two: what they exchange, and no scores sorted or sent."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x4", target_config=H100)
    devices = np.array(topology.devices).reshape(2, 2)
    four = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rows, sae = 1024, TopK(256, 16384, 32, matmul_dtype="bfloat16")
    config = MeshConfig(2, 2)
    program = train_step(sae, rows, config, four, "cuda")
    check_bytes(program, sae, rows, config)
    text = program.as_text()
    gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    assert gathers and not [g for g in gathers if re.search(r"\[\d+,(8192|16384)\]", g)]
    assert sorted_widths(program) and max(sorted_widths(program)) <= 2048
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    assert not [t for t in targets if re.search("topk|radix", t, re.IGNORECASE)]
