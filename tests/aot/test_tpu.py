"""Every TPU kernel, and the whole step, goes through the TPU's compiler for v5e, v5p and v6e.

Nothing runs. What is checked: that it compiles, memory against the kernels' own models, which
collectives and sorts the program has. XLA takes 10 s to compile a sort for TPUs.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from saex.kernels.adam import Scalars
from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.adam import reference as adam_ref
from saex.kernels.encode_topk import pallas_tpu as encode_tpu
from saex.kernels.sparse_affine import pallas_tpu as affine_tpu
from saex.kernels.sparse_decode import pallas_tpu as decode_tpu
from saex.kernels.topk import pallas_tpu as topk_tpu
from saex.kernels.topk import pallas_tpu_bins as bins
from saex.sae.batch_topk import BatchTopK
from saex.sae.topk import TopK
from saex.sharding import MeshConfig
from tests.aot.test_collectives import check_bytes
from tests.compiled import exchanges, train_step

pytestmark = pytest.mark.aot

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# (rows, d, n, k): what fits next to each other, and a width and k that strain VMEM
SHAPES = {"A": (4096, 768, 24576, 32), "E": (8192, 4096, 131072, 64)}
QUICK = (
    ("v5e", 4),
    ("v5p", 1),
    ("v6e", 1),
)  # steps that are compiled by default: (TPU, shards of latents)


def mesh_of(tpu, data=1, model=1, sweep=1):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'jax[tpu]' brings libtpu")
    devices = topologies.get_topology_desc(TPUS.get(tpu, tpu), platform="tpu").devices
    sizes = ({"sweep": sweep} if sweep > 1 else {}) | {"data": data, "model": model}
    devices = np.array(devices[: sweep * data * model]).reshape(*sizes.values())
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def compiled(tpu, f, *shapes, dtypes=(), donate=()):
    """f compiled for one chip."""
    mesh = mesh_of(tpu)
    dtypes = [*dtypes, *(["float32"] * (len(shapes) - len(dtypes)))]
    where = jax.NamedSharding(mesh, jax.P())
    args = [jax.ShapeDtypeStruct(s, t, sharding=where) for s, t in zip(shapes, dtypes)]
    with jax.set_mesh(mesh):
        traced = jax.jit(f, donate_argnums=donate).trace(*args)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def kernel_vmem(program):
    """VMEM bytes of each Pallas kernel: what it uses behind what XLA itself holds there."""
    out = []
    for line in program.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            scopes = (
                r'scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
            )
            (start, _), (_, end) = re.findall(scopes, line)
            out.append(int(end) - int(start))
    return out


def score_sorts(program, n):
    """Lines that sort something as long as the latents."""
    lines = program.as_text().splitlines()
    return [line for line in lines if " sort(" in line and re.search(rf"\[\d+,{n}\]", line)]


def check(program, model, temp):
    """One kernel, its VMEM within 1.2 of ``model``, other memory at most ``temp`` bytes."""
    (used,) = kernel_vmem(program)
    assert used <= 1.2 * model, (used, model)
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * temp + 2**20
    return used


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_and_dots(tpu, shape):
    b, d, n, k = SHAPES[shape]
    model = decode_tpu.vmem_bytes(k, d)
    codes = 8 * b * max(k, 128)
    shapes = (b, k), (b, k), (n, d)
    program = compiled(tpu, decode_tpu.decode, *shapes, dtypes=("float32", "int32"))
    assert check(program, model, codes) >= model / 1.2
    shapes = (b, k), (b, d), (n, d)
    program = compiled(tpu, decode_tpu.dots, *shapes, dtypes=("int32",))
    assert check(program, model, codes) >= model / 1.2


@pytest.mark.parametrize(
    "tpu",  # that of the others is in their training steps
    [pytest.param(tpu, marks=[] if tpu == "v5e" else pytest.mark.slow) for tpu in TPUS],
)
def test_backward_pass(tpu):
    b, d, n, k = SHAPES["A"]
    model = affine_tpu.vmem_bytes(d, d)
    shapes = (b, k), (b, k), (b, k), (b, d), (b, d), (n, d)
    dtypes = "float32", "float32", "int32"
    program = compiled(tpu, affine_tpu.grads, *shapes, dtypes=dtypes)
    assert check(program, model, 4 * b * 2 * d + 12 * b * k) >= model / 1.2


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_top_k(tpu, dtype):
    b, _, n, k = SHAPES["A"]
    program = compiled(tpu, lambda s: topk_tpu.top_k(s, k), (b, n), dtypes=(dtype,))
    blocks = 2 * bins.ROWS * bins.COLUMNS * jnp.dtype(dtype).itemsize
    # the way out for rows that the check refuses: XLA's TopK on a block of rows
    check(program, bins.vmem_bytes(b, n, k, bins.COLUMNS) + blocks, 4 * 4 * topk_tpu.FALLBACK)
    assert not score_sorts(program, n)


def test_top_k_of_a_million(tpu="v5p"):
    b, n, k = 256, 1_000_000, 256
    program = compiled(tpu, lambda s: topk_tpu.top_k(s, k), (b, n), dtypes=("float32",))
    (used,) = kernel_vmem(program)
    assert used <= 1.2 * (bins.vmem_bytes(b, n, k, bins.COLUMNS) + 8 * bins.ROWS * bins.COLUMNS)
    assert not score_sorts(program, n)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("shape, dtype", [("A", "float32"), ("A", "bfloat16"), ("E", "bfloat16")])
def test_encode_topk_holds_no_scores(tpu, shape, dtype):
    b, d, n, k = SHAPES[shape]

    def encode(x, b_pre, W_enc, b_enc):
        return encode_tpu.encode_topk(x, b_pre, W_enc, b_enc, k, dtype)

    program = compiled(tpu, encode, (b, d), (d,), (n, d), (n,))
    size = jnp.dtype(dtype).itemsize
    operands = size * (b * d + (n * d if size < 4 else 0))
    model = encode_tpu.vmem_bytes(b, d, n, k, size)
    check(program, model, operands + 4 * 4 * topk_tpu.FALLBACK)
    assert f"[{b},{n}]" not in program.as_text()
    assert not score_sorts(program, n)


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adam_is_one_kernel_in_place(tpu, shape):
    """Nothing is made beside it; optax takes twice its 28 bytes a number."""
    _, d, n, _ = SHAPES[shape]
    scalars = Scalars(*map(jnp.float32, (0.1, 0.2, 0.003, 0.7)))

    def moved(how):
        def f(*arrays):
            return how(*arrays, scalars, (0.9, 0.999), 1e-8, True)

        return compiled(tpu, f, *[(n, d)] * 4, donate=(0, 2, 3))

    program = moved(adam_tpu.adam)
    size = adam_tpu.block_rows(n, d)
    model = adam_tpu.vmem_bytes(size, d)
    assert check(program, model, 0) >= model / 1.2
    # Inside of a kernel the compiler counts what the kernel says; optax's passes it counts itself.
    assert program.cost_analysis()["bytes accessed"] == pytest.approx(
        adam_tpu.hbm_bytes(n, d), rel=0.2
    )
    assert moved(adam_ref.adam).cost_analysis()["bytes accessed"] >= 2 * 28 * n * d


@pytest.mark.parametrize(
    ("tpu", "model"),
    [
        pytest.param(tpu, m, marks=[] if (tpu, m) in QUICK else pytest.mark.slow)
        for tpu in TPUS
        for m in (1, 4)
    ],
)
def test_training_step(tpu, model):
    rows, n, d, k = (1024, 16384, 256, 32) if model > 1 else (256, 8192, 128, 8)
    sae = TopK(d_in=d, n=n, k=k, matmul_dtype="bfloat16")
    config = MeshConfig(1, model)
    program = train_step(sae, rows, config, mesh_of(tpu, 1, model), "tpu")
    assert kernel_vmem(program)
    assert not score_sorts(program, n // model)
    text = program.as_text()
    gathers = re.findall(r"= (\S+) all-gather(?:-start)?\(", text)
    assert not [shape for shape in gathers if f"[{rows},{n}]" in shape]
    assert bool(gathers) == (model > 1)
    check_bytes(program, sae, rows, config)
    assert len(re.findall(r"%adam[.\d]* = .*tpu_custom_call", text)) == 2


def test_training_step_of_ragged_codes():
    """Looked for by selections, laid out in lines, and a dense way beside it."""
    sae = BatchTopK(d_in=128, n=4096, k=8, matmul_dtype="bfloat16")
    program = train_step(sae, 256, MeshConfig(), mesh_of("v5e"), "tpu")
    assert kernel_vmem(program) and not score_sorts(program, sae.n)
    assert " conditional(" in program.as_text()


def test_training_step_of_a_stack():
    """Members one behind the other hold kernels of their own; those on a sweep axis do not talk."""
    sae = TopK(d_in=128, n=8192, k=8, matmul_dtype="bfloat16")
    text = train_step(sae, 256, MeshConfig(), mesh_of("v5e"), "tpu", members=2).as_text()
    assert len(re.findall(r"%adam[.\d]* = .*tpu_custom_call", text)) == 4
    config = MeshConfig(sweep=2)
    program = train_step(sae, 256, config, mesh_of("v5e", sweep=2), "tpu", members=2)
    assert kernel_vmem(program) and not score_sorts(program, sae.n)
    assert not exchanges(program)
