"""Bytes a TPU holds during a training step, as its compiler says; nothing runs."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from saex import config as configs
from saex import cost
from saex.sae import ReLU, TopK
from saex.sharding import DATA, MODEL, MeshConfig
from saex.train.state import initial
from tests import compiled

pytestmark = pytest.mark.aot

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HALF = {"matmul_dtype": "bfloat16"}
CASES = {  # a TPU, a dictionary, rows, a mesh
    "in VMEM": ("v5e", TopK(512, 8192, 32), 4096, MeshConfig(1, 1)),
    "gradients": ("v5e", TopK(768, 24576, 32), 4096, MeshConfig(1, 1)),
    "bfloat16": ("v6e", TopK(1024, 32768, 32, **HALF), 8192, MeshConfig(1, 1)),
    "wide rows": ("v5e", TopK(2304, 65536, 64), 4096, MeshConfig(1, 1)),
    "latents split": ("v5e", TopK(2304, 65536, 64, **HALF), 4096, MeshConfig(1, 2)),
    "rows split": ("v5p", TopK(2304, 65536, 32), 8192, MeshConfig(2, 1)),
    "both split": ("v5p", TopK(1024, 65536, 32), 8192, MeshConfig(2, 2)),
    "fsdp": ("v5p", TopK(1024, 65536, 32), 8192, MeshConfig(4, 1, strategy="fsdp")),
    "dense codes": ("v5e", ReLU(1024, 32768, capacity=0), 8192, MeshConfig(1, 1)),
    "dense codes in VMEM": ("v5e", ReLU(512, 8192, capacity=0), 2048, MeshConfig(1, 1)),
    "dense codes, latents split": ("v6e", ReLU(768, 24576, capacity=0), 4096, MeshConfig(1, 2)),
    "dense codes, rows split": ("v5p", ReLU(768, 24576, capacity=0), 4096, MeshConfig(2, 1)),
    "dense codes, both split": ("v6e", ReLU(768, 24576, capacity=0), 4096, MeshConfig(2, 2)),
}
QUICK = ("gradients", "dense codes", "dense codes, both split")  # TopK takes minutes to compile
EACH = [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES]


def step_on(tpu, sae, batch, config):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'jax[tpu]' brings libtpu")
    devices = topologies.get_topology_desc(TOPOLOGY[tpu], platform="tpu").devices
    devices = np.array(devices[: config.size]).reshape(config.data, config.model)
    mesh = jax.sharding.Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Explicit,) * 2)
    return compiled.train_step(sae, batch, config, mesh, "tpu")


def needed(program):
    """Bytes without the holes that the compiler leaves between arrays where there is room.

    Its peak has no holes. It counts on-chip memory instead where more is held there, and is then
    more than arguments and temporary memory.
    """
    return min(program.memory_analysis().peak_memory_in_bytes, compiled.bytes_of(program))


@pytest.mark.parametrize("name", EACH)
def test_prediction_is_within_a_tenth_of_the_compiled_program(name):
    tpu, *case = CASES[name]
    program, predicted = step_on(tpu, *case), cost.memory(*case, hardware=tpu)
    given = program.memory_analysis().argument_size_in_bytes
    # scalars and short vectors take whole tiles
    assert given == pytest.approx(predicted.total - predicted.temporary, rel=0.001)
    assert predicted.total == pytest.approx(needed(program), rel=0.1), f"\n{predicted}"


def test_a_million_latents_fit_on_four_chips_of_v5p():
    config = configs.load("experiments/wide.py")
    program = step_on("v5p", config.sae, config.stream.batch, config.mesh)
    predicted = cost.memory(config.sae, 8192, config.mesh, hardware="v5p")
    given = program.memory_analysis().argument_size_in_bytes
    assert given == pytest.approx(predicted.total - predicted.temporary, rel=0.001)
    assert predicted.total == pytest.approx(needed(program), rel=0.1), f"\n{predicted}"
    held = compiled.bytes_of(program)
    assert held < 0.9 * cost.hardware("v5p").memory, f"{held / 1e9:.1f} GB"


def test_a_million_latents_are_made_in_parts():
    """Beside the state, each chip's own parts; whole, as smaller ones are made, 34 GB more."""
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'jax[tpu]' brings libtpu")
    config = configs.load("experiments/wide.py")
    devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
    devices = np.array(devices).reshape(1, 4)
    mesh = jax.sharding.Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        alone = jax.NamedSharding(mesh, jax.P())
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=alone)
        x = jax.ShapeDtypeStruct((32768, 4096), "float32", sharding=alone)
        tx = config.optim.transformation()
        traced = jax.jit(initial(config.sae, tx, mesh, "tp")).trace(key, {"x": x})
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    held = program.memory_analysis().peak_memory_in_bytes
    predicted = cost.memory(config.sae, 8192, config.mesh, hardware="v5p")
    state = predicted.parameters + predicted.optimiser + predicted.statistics
    assert state < held < predicted.start, f"{held / 1e9:.1f} GB"
