"""What TPUs exchange in a compiled step, against the cost model's formulas; nothing runs."""

import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from saex.cost import collectives
from saex.sae import TopK
from saex.sharding import DATA, MODEL, MeshConfig
from tests import compiled

pytestmark = pytest.mark.aot

SAE, ROWS = TopK(256, 16384, 32, matmul_dtype="bfloat16"), 1024
MESHES = {  # latents alone: test_tpu.py, which compiles that step
    "both": MeshConfig(2, 2),
    "fsdp": MeshConfig(4, 1, strategy="fsdp"),
}


class Text:
    """A part of a program's text, as ``compiled.exchanges`` takes it."""

    def __init__(self, blocks):
        self.text = "\n\n".join(blocks)

    def as_text(self):
        return self.text


def exchanged(program):
    """Bytes by kind, outside of branches.

    A TPU's reduce-scatter is a fusion of an all-reduce with a slice of it, in a computation that is
    named so.
    """
    blocks = re.split(r"\n\n+", program.as_text())
    scattered = [b for b in blocks if b.lstrip().startswith("%all-reduce-scatter")]
    rest = [b for b in blocks if b not in scattered]
    found = dict.fromkeys(compiled.KINDS, 0)
    found["reduce-scatter"] = sum(e.payload for e in compiled.exchanges(Text(scattered)))
    for e in compiled.exchanges(Text(rest)):
        found[e.kind] += 0 if e.conditional else e.payload
    return found


def program(config):
    """The training step compiled for four chips of v5e."""
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'jax[tpu]' brings libtpu")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    devices = np.array(devices).reshape(config.data, config.model)
    mesh = jax.sharding.Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Explicit,) * 2)
    return compiled.train_step(SAE, ROWS, config, mesh, "tpu")


def check_bytes(program, sae, rows, config):
    """What the program exchanges is what the formulas say, by kind."""
    found, expected = exchanged(program), collectives.of_step(sae, rows, config)
    for kind, got in found.items():
        want = sum(c.payload for c in expected if c.kind == kind)
        # beside them, scalars and a few vectors of d or of a device's rows
        assert want - 8 * sae.d_in <= got <= want + 4 * (6 * sae.d_in + rows + 64), (kind, found)


@pytest.mark.slow  # TopK takes minutes to compile
@pytest.mark.parametrize("name", MESHES)
def test_bytes_by_kind_are_those_of_the_formulas(name):
    check_bytes(program(MESHES[name]), SAE, ROWS, MESHES[name])


def test_the_count_of_bytes_can_fail():
    """A reduce-scatter is not taken for the all-reduce that it is made of."""
    line = "  %r = f32[64,8]{1,0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3}}"
    text = (
        f"%all-reduce-scatter (i: f32[64,8]) -> f32[16,8] {{\n{line}\n}}\n\nENTRY %m {{\n{line}\n}}"
    )
    found = {kind: size for kind, size in exchanged(Text([text])).items() if size}
    assert found == {"all-reduce": 2048, "reduce-scatter": 2048}
