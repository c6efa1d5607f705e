"""Predicted bytes of a training step against the compiled program's own account of them."""

import importlib

import jax
import pytest

from saex import cost
from saex.sae import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopAFA, TopK
from saex.sharding import MeshConfig, make_mesh
from saex.train import state
from saex.train.optim import Optim
from tests import compiled

CASES = {  # a dictionary, rows, a mesh: each is at its largest in another moment of the step
    "selection by groups": (TopK(512, 8192, 32), 4096, MeshConfig(1, 1)),
    "ragged": (TopK(512, 8190, 32), 4096, MeshConfig(1, 1)),
    "few latents": (TopK(512, 4096, 32), 4096, MeshConfig(1, 1)),
    "bfloat16": (TopK(512, 8192, 32, matmul_dtype="bfloat16"), 2048, MeshConfig(1, 1)),
    "update": (TopK(768, 24576, 32), 2048, MeshConfig(2, 4)),
    "candidates of AuxK": (TopK(512, 8192, 32), 4096, MeshConfig(1, 8)),
    "fsdp": (TopK(512, 8192, 32), 1024, MeshConfig(8, 1, strategy="fsdp")),
    "fsdp, latents split": (TopK(256, 32768, 64), 2048, MeshConfig(2, 4, strategy="fsdp")),
    "dense codes": (ReLU(256, 8192, capacity=0), 1024, MeshConfig(1, 1)),
    "found above 0": (ReLU(256, 8192), 1024, MeshConfig(1, 1)),
    "found of a batch": (BatchTopK(512, 8192, 32), 2048, MeshConfig(1, 1)),
    "of a batch densely, AuxK": (BatchTopK(256, 1008, 32), 4096, MeshConfig(1, 1)),
    "found, few rows": (BatchTopK(1024, 8192, 32), 512, MeshConfig(1, 1)),
    "found, latents split": (BatchTopK(512, 16384, 16), 1024, MeshConfig(1, 2)),
    "found above thresholds": (JumpReLU(512, 16384), 2048, MeshConfig(1, 1)),
    "thresholds, few rows": (JumpReLU(1024, 8192), 512, MeshConfig(1, 1)),
    "thresholds, both split": (JumpReLU(512, 16384), 2048, MeshConfig(2, 2)),
    "prefixes": (Matryoshka(512, 2048), 2048, MeshConfig(1, 1)),
    "prefixes, densely": (Matryoshka(512, 512), 2048, MeshConfig(1, 1)),
    "narrow": (TopK(256, 512, 32), 1024, MeshConfig(1, 1)),
    "gates": (Gated(512, 8192), 2048, MeshConfig(1, 1)),
    "gates, densely": (Gated(256, 2048, capacity=0), 4096, MeshConfig(1, 1)),
    "norms": (TopAFA(256, 2048), 4096, MeshConfig(1, 1)),
}


METHODS = ("found of a batch", "thresholds, few rows")
SLOW = (  # the others cover the moments
    "few latents",
    "fsdp, latents split",
    "candidates of AuxK",
    "found, few rows",
    "of a batch densely, AuxK",
    "found, latents split",
    "thresholds, both split",
    "prefixes",
    "prefixes, densely",
    "gates, densely",
    "norms",
)
EACH = [
    *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
    *(pytest.param(n, marks=pytest.mark.methods) for n in METHODS),
    *(name for name in CASES if name not in (*SLOW, *METHODS)),
]


@pytest.mark.parametrize("name", EACH)
def test_prediction_is_within_a_tenth_of_the_compiled_program(name):
    sae, batch, mesh = CASES[name]
    program = compiled.train_step(sae, batch, mesh)
    predicted = cost.memory(sae, batch, mesh)
    given = program.memory_analysis().argument_size_in_bytes
    exact = predicted.total - predicted.temporary
    assert 0 <= given - exact <= 64  # the rest: learning rate, k and other scalars
    assert predicted.total == pytest.approx(compiled.bytes_of(program), rel=0.1), f"\n{predicted}"


@pytest.mark.parametrize(
    "sae", [TopK(256, 2048, 32), ReLU(256, 2048)], ids=lambda s: s.codes.__name__
)
def test_a_stack_is_predicted_within_a_tenth(sae):
    program = compiled.train_step(sae, 4096, MeshConfig(), members=3)
    predicted = cost.memory(sae, 4096, MeshConfig(), members=3)
    assert predicted.total == pytest.approx(compiled.bytes_of(program), rel=0.1), f"\n{predicted}"


def test_the_cases_differ_in_what_is_largest():
    moments = [cost.memory(*CASES[name]).moments for name in CASES]
    largest = {max(m, key=lambda name: m[name]) for m in moments}
    assert largest == {"selection", "auxk", "update", "codes"}


def test_fsdp_stores_a_part_where_tp_stores_a_copy():
    meshes = [MeshConfig(8, 1, strategy=strategy) for strategy in ("tp", "fsdp")]
    tp, fsdp = (cost.memory(TopK(512, 16384), 1024, mesh) for mesh in meshes)
    assert fsdp.optimiser == pytest.approx(tp.optimiser / 8, rel=0.01)
    assert fsdp.batch == tp.batch == 1024 // 8 * 512 * 2


def test_a_dry_run_prints_the_prediction(capsys):
    from saex import cli

    argv = ["train", "--config=experiments/quickstart.py", "--dry_run", "--config.mesh.model=2"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    predicted = cost.memory(TopK(256, 2048, 32), 4096, MeshConfig(1, 2))
    assert str(predicted) in out
    assert f"a device holds  {predicted.total / 1e6:,.1f} MB" in out


def test_a_dry_run_may_be_for_a_tpu_that_is_not_here(capsys):
    from saex import cli

    argv = ["train", "--config=experiments/quickstart.py", "--dry_run"]
    assert cli.main([*argv, "--hardware=v5e"]) == 0
    predicted = cost.memory(TopK(256, 2048, 32), 4096, MeshConfig(), hardware="v5e")
    assert predicted.total < cost.memory(TopK(256, 2048, 32), 4096, MeshConfig()).total
    assert str(predicted) in capsys.readouterr().out
    assert cli.main([*argv, "--hardware=v9"]) != 0
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # it would be read by nothing
        cli.main([*argv[:2], "--workdir=nowhere", "--hardware=v5e"])


@pytest.mark.parametrize("parts", [False, True])
def test_what_is_held_while_the_state_is_made(parts, monkeypatch):
    """The compiled initialisation's own account, made whole on each device or in parts."""
    memory = importlib.import_module("saex.cost.memory")  # saex.cost.memory is a function
    assert memory.WHOLE == state.WHOLE
    if parts:
        monkeypatch.setattr(memory, "WHOLE", 0)
        monkeypatch.setattr(state, "WHOLE", 0)
    sae, config = TopK(1024, 16384, 32), MeshConfig(1, 8)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        alone = jax.NamedSharding(mesh, jax.P())
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=alone)
        x = jax.ShapeDtypeStruct((64, 1024), "float32", sharding=alone)
        init = state.initial(sae, Optim().transformation(), mesh, config.strategy)
        program = jax.jit(init).lower(key, {"x": x}).compile()
    predicted = cost.memory(sae, 4096, config).start
    assert predicted == pytest.approx(compiled.bytes_of(program), rel=0.25)
    whole = 4 * 1024 * 16384
    assert (predicted > 4 * whole) != parts
