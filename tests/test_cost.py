"""The cost model against independent arithmetic, and the command that prints it."""

import json

import pytest

from saex import cli, cost
from saex.cost import collectives
from saex.sae import ReLU, TopK
from saex.sharding import MeshConfig

ONE = MeshConfig()
# (d, n, k, b) and the floors in ms, worked out by hand from the constants of each device with two
# digits or three: bf16, one device, nothing dead
FLOORS = {
    (768, 24576, 32, 4096): {"h200": 0.59, "v5e": 2.9, "v5p": 0.96, "v6e": 1.21},
    (768, 32768, 32, 8192): {"h200": 1.15, "v5e": 5.4, "v5p": 1.9, "v6e": 2.1},
    (2304, 16384, 64, 4096): {"h200": 1.75, "v5e": 8.7, "v5p": 2.8, "v6e": 3.9},
    (2304, 65536, 64, 8192): {"h200": 6.8, "v5e": 32, "v5p": 11.2, "v6e": 12.4},
    (4096, 131072, 64, 8192): {"h200": 21.2, "v5e": 97, "v5p": 35, "v6e": 36},
}


def floor(d, n, k, b, device="h200", mesh=ONE, dead=0, dtype="bfloat16"):
    return cost.step(TopK(d, n, k, matmul_dtype=dtype), b, mesh, cost.hardware(device), dead)


def seconds(c):
    return {t.term.name: t.seconds for t in c.terms}


@pytest.mark.parametrize("shape", FLOORS, ids=str)
def test_floors(shape):
    for device, ms in FLOORS[shape].items():
        assert 1e3 * floor(*shape, device).seconds == pytest.approx(ms, rel=0.025)


def test_what_binds():
    bound = {t.term.name: t.bound for t in floor(768, 24576, 32, 4096).terms}
    assert bound.pop("encoder matmul") == "compute"
    assert set(bound.values()) == {"memory"}


def test_terms_scale_as_their_formulas_say():
    base, twice_rows = seconds(floor(768, 65536, 32, 8192)), seconds(floor(768, 65536, 32, 16384))
    assert twice_rows["encoder matmul"] == pytest.approx(2 * base["encoder matmul"])
    assert twice_rows["optimiser"] == pytest.approx(base["optimiser"])
    assert twice_rows["decode"] == pytest.approx(2 * base["decode"])
    # Adam binds below b = 26 F / W rows, whatever d and n
    ridge = 790e12 / 4.3e12
    assert base["optimiser"] / base["encoder matmul"] == pytest.approx(26 * ridge / 8192)


def test_dense_codes_cost_five_matmuls():
    c = cost.step(ReLU(768, 24576), 4096, ONE, cost.hardware("h200"))
    assert sum(t.term.flops for t in c.terms) == 10 * 4096 * 768 * 24576
    sparse = floor(768, 24576, 32, 4096, dtype="float32")
    assert c.seconds > 2 * sparse.seconds


def test_dead_latents_are_five_matmuls_on_their_block():
    alive, dying = floor(768, 24576, 32, 4096), floor(768, 24576, 32, 4096, dead=1024)
    assert "auxk" not in seconds(alive)
    aux = next(t.term for t in dying.terms if t.term.name == "auxk")
    assert aux.flops == 5 * 2 * 4096 * 768 * 1024
    assert dying.seconds > alive.seconds


def test_splitting_latents_divides_the_work_and_adds_exchanges_that_grow_with_the_batch():
    whole, split = (
        floor(4096, 131072, 64, 8192),
        floor(4096, 131072, 64, 8192, mesh=MeshConfig(1, 8)),
    )
    a, b = seconds(whole), seconds(split)
    assert b["encoder matmul"] == pytest.approx(a["encoder matmul"] / 8)
    assert b["optimiser"] == pytest.approx(a["optimiser"] / 8)
    sent = {t.term.name: t.term.sent for t in split.terms}
    assert sent["reconstruction (model)"] == 2 * 7 / 8 * 4 * 8192 * 4096
    assert sent["candidates (model)"] == 7 * 4 * 8192 * 64  # received and sent alike
    assert not any("data" in name for name in sent)


def test_splitting_rows_adds_a_sum_of_gradients_that_grows_with_the_dictionary():
    sent = {}
    for strategy in ("tp", "fsdp"):
        mesh = MeshConfig(8, 1, strategy=strategy)
        found = collectives.of_step(TopK(768, 24576), 8192, mesh)
        names = ("gradients", "weights", "biases")
        sent[strategy] = sum(c.sent for c in found if c.name in names)
        numbers = 2 * 768 * 24576 + 24576 + 768
        assert sent[strategy] == pytest.approx(2 * 7 / 8 * 4 * numbers)
    optimiser = [
        seconds(floor(768, 24576, 32, 8192, mesh=MeshConfig(8, 1, strategy=s)))["optimiser"]
        for s in ("tp", "fsdp")
    ]
    assert optimiser[0] == pytest.approx(8 * optimiser[1])


def test_one_device_exchanges_nothing():
    assert collectives.of_step(TopK(64, 1024), 256, ONE) == []


def test_moments_in_bfloat16_move_and_hold_less():
    sae, h200 = TopK(768, 24576, matmul_dtype="bfloat16"), cost.hardware("h200")
    full, half = (cost.step(sae, 4096, ONE, h200, moments=m) for m in ("float32", "bfloat16"))
    assert seconds(half)["optimiser"] == pytest.approx(18 / 26 * seconds(full)["optimiser"])
    held = [cost.memory(sae, 4096, ONE, moments=m).optimiser for m in ("float32", "bfloat16")]
    assert held[1] == pytest.approx(held[0] / 2)


def test_an_unknown_machine_is_refused():
    with pytest.raises(ValueError, match=r"h100.*choose from h200, v5e"):
        cost.hardware("h100")


def test_the_command_prints_the_table_and_what_it_assumes(capsys):
    config = "--config=experiments/quickstart.py"
    overrides = ["--config.mesh.model=4", "--config.sae.k=16"]
    assert cli.main(["info", config, "--hardware=v5p", "--dead=64", *overrides]) == 0
    out = capsys.readouterr().out
    for part in ("encoder matmul", "reconstruction (model)", "auxk", "tokens/s", "A floor", "k=16"):
        assert part in out
    assert cli.main(["info", config, "--hardware=h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    terms = found["terms"].values()
    assert found["seconds"] == pytest.approx(sum(t["seconds"] for t in terms))
    assert found["tokens_per_second"] == pytest.approx(4096 / found["seconds"])


@pytest.mark.parametrize(
    "argv", [[], ["run", "--config=x.py", "--hardware=cpu"], ["--config=x.py"]]
)
def test_info_wants_a_run_or_a_config_and_a_machine(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", *argv])
    assert stopped.value.code == 2
    assert "give a RUN, or --config=FILE --hardware=NAME" in capsys.readouterr().err


def test_a_cpu_is_measured():
    cpu = cost.hardware("cpu")
    assert 1e9 < cpu.flops["float32"] < 1e14
    assert 1e9 < cpu.bandwidth < 1e12
    assert "CPU" in cpu.describe()
