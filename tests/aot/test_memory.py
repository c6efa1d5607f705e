"""Bytes a TPU holds during a training step, as its compiler says; nothing runs."""

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from saex import config as configs
from saex import cost
from saex.sharding import DATA, MODEL
from tests import compiled

pytestmark = pytest.mark.aot

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}


def step_on(tpu, sae, batch, config):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'jax[tpu]' brings libtpu")
    devices = topologies.get_topology_desc(TOPOLOGY[tpu], platform="tpu").devices
    devices = np.array(devices[: config.size]).reshape(config.data, config.model)
    mesh = jax.sharding.Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Explicit,) * 2)
    return compiled.train_step(sae, batch, config, mesh, "tpu")


@pytest.mark.slow
def test_a_million_latents_fit_on_four_chips_of_v5p():
    config = configs.load("experiments/wide.py")
    program = step_on("v5p", config.sae, config.stream.batch, config.mesh)
    held, predicted = compiled.bytes_of(program), cost.memory(config.sae, 8192, config.mesh)
    given = program.memory_analysis().argument_size_in_bytes
    assert given == pytest.approx(predicted.total - predicted.temporary, rel=0.001)
    assert held < 0.9 * cost.hardware("v5p").memory, f"{held / 1e9:.1f} GB"
