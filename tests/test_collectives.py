"""What devices exchange in a compiled training step, against the cost model's formulas."""

import math

import pytest

from saex.cost import collectives
from saex.sae import BatchTopK, TopK
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


class Text:
    """A line of a program, as ``exchanges`` takes it."""

    def __init__(self, line):
        self.as_text = lambda: f"  %x = {line}"


@pytest.mark.parametrize(
    ("line", "kind", "payload", "group"),
    [
        ("f32[8]{0} all-reduce(%y), replica_groups={{0,1},{2,3}}", "all-reduce", 32, 2),
        (
            "(f32[2], f32[8]) all-gather-start(%y), replica_groups=[2,4]<=[8]",
            "all-gather",
            32,
            4,
        ),
        (
            "f32[8] collective-permute(%y), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
            "collective-permute",
            32,
            2,
        ),
        (
            "(s32[8], s32[8], u32[], u32[]) collective-permute-start(%y), "
            "source_target_pairs={{0,1},{1,2},{2,0}}",
            "collective-permute",
            32,
            3,
        ),
    ],
)
def test_every_kind_of_exchange_is_counted_once(line, kind, payload, group):
    (found,) = compiled.exchanges(Text(line))
    assert (found.kind, found.payload, found.group) == (kind, payload, group)


def test_a_device_that_sends_to_itself_exchanges_nothing():
    line = "f32[8] collective-permute(%y), source_target_pairs={{0,0},{1,1}}"
    assert compiled.exchanges(Text(line)) == []


@pytest.mark.parametrize("mesh", [MeshConfig(2, 4)], ids=str)
def test_a_batch_is_selected_by_counts_alone(mesh):
    """BatchTopK: no value or index travels, in neither way of taking the batch."""
    program = compiled.train_step(BatchTopK(D, N, K, capacity=2 * K, aux_coefficient=0.0), B, mesh)
    found = compiled.exchanges(program)
    assert {e.kind for e in found} == {"all-reduce"}
    rows, n = B // mesh.data, N // mesh.model
    arrays = [(e, shape) for e in found for _, shape in e.shapes]
    for e, shape in arrays:
        size = math.prod(shape)
        # sums of reconstructions, of gradients, of what a latent or a row has one of
        assert size <= max(D, rows) or size == n or shape[-1] == D, e
        assert e.conditional or size <= rows, e
    assert {(rows, D), (n, D)} <= {shape for _, shape in arrays}
    for shape in compiled.sorts(program):
        assert math.prod(shape) < rows * n, shape
