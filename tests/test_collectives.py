"""What devices exchange in a compiled training step, against the cost model's formulas."""

import math

import pytest

from saex.cost import collectives
from saex.sae import TopK
from saex.sharding import DATA, MODEL, MeshConfig
from tests import compiled

D, N, K, B = 64, 4096, 16, 512
MESHES = [
    MeshConfig(1, 1),
    MeshConfig(8, 1),
    MeshConfig(2, 4),
    MeshConfig(1, 8),
    MeshConfig(2, 4, strategy="fsdp"),
]


@pytest.fixture(scope="module")
def programs():
    made = {}

    def get(mesh):
        if mesh not in made:
            made[mesh] = compiled.train_step(TopK(D, N, K), B, mesh)
        return made[mesh]

    return get


def of(exchanges, axis_size, gathered):
    here = [e for e in exchanges if e.group == axis_size and not e.conditional]
    return [e for e in here if (e.kind == "all-gather") == gathered]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_bytes_by_mesh_axis_are_those_of_the_formulas(programs, mesh):
    found = compiled.exchanges(programs(mesh))
    expected = collectives.of_step(TopK(D, N, K), B, mesh)
    if mesh.size == 1:
        assert found == [] and expected == []
    for axis, size in ((DATA, mesh.data), (MODEL, mesh.model)):
        for gathered in (True, False) if size > 1 else ():
            got = sum(e.payload for e in of(found, size, gathered))
            want = [c for c in expected if c.axis == axis]
            want = sum(c.payload for c in want if (c.kind == "all-gather") == gathered)
            # beside them, scalars and a few vectors of d or of a device's rows
            assert want <= got <= want + 4 * (4 * D + B // mesh.data + 32), (axis, gathered)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_arrays_that_are_exchanged_are_those_of_the_formulas(programs, mesh):
    found = [e for e in compiled.exchanges(programs(mesh)) if not e.conditional]
    large = [shape for e in found for _, shape in e.shapes if math.prod(shape) > max(D, B)]
    rows, n, d = B // mesh.data, N // mesh.model, (N // mesh.model, D)
    expected = []
    if mesh.model > 1:
        expected += [(rows, K * mesh.model), (rows, D), (rows, D)]  # candidates, y and AuxK's y
    if mesh.data > 1:
        expected += [(n,), (n,), (n,), d, d]  # fired, AuxK's fired, b_enc, gradients
    if mesh.strategy == "fsdp":
        expected += [d, d, (n,), (n,)]  # weights, row norms
    assert sorted(large, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_rows_times_latents_is_exchanged_or_sorted(programs, mesh):
    rows = {B, B // mesh.data}
    latents = {N, N // mesh.model}

    def wide(shape):
        return len(shape) > 1 and math.prod(shape) >= min(rows) * min(latents) and shape[0] in rows

    for e in compiled.exchanges(programs(mesh)):
        assert not any(wide(shape) for _, shape in e.shapes), e
    for shape in compiled.sorts(programs(mesh)):
        assert math.prod(shape) < min(rows) * min(latents), shape


def test_the_formulas_are_wrong_where_they_should_be(programs):
    """A dictionary of another k, or another mesh, does not pass for this one."""
    gathers = [e for e in compiled.exchanges(programs(MeshConfig(1, 8))) if e.kind == "all-gather"]
    gathers = [e for e in gathers if not e.conditional]
    assert sum(e.payload for e in gathers) != collectives.candidates(B, K + 1, N, 8).payload
    assert sum(e.payload for e in gathers) == collectives.candidates(B, K, N, 8).payload
