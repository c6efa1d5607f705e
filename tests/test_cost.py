"""The cost model against independent arithmetic, and the command that prints it."""

import json

import jax
import pytest

from saex import cli, cost
from saex.cost import collectives
from saex.cost.slots import room, slots
from saex.sae import (
    SAES,
    BatchCrosscoder,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    MultiLayer,
    MutualChoice,
    ReLU,
    TopK,
    selection,
)
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
    c = cost.step(ReLU(768, 24576, capacity=0), 4096, ONE, cost.hardware("h200"))
    assert sum(t.term.flops for t in c.terms) == 10 * 4096 * 768 * 24576
    sparse = floor(768, 24576, 32, 4096, dtype="float32")
    assert c.seconds > 2 * sparse.seconds


def test_dead_latents_are_five_matmuls_on_their_block():
    alive, dying = floor(768, 24576, 32, 4096), floor(768, 24576, 32, 4096, dead=1024)
    assert "auxk" not in seconds(alive)
    aux = next(t.term for t in dying.terms if t.term.name == "auxk")
    assert aux.flops == 5 * 2 * 4096 * 768 * 1024
    assert dying.seconds > alive.seconds


HALF = {"matmul_dtype": "bfloat16"}
WIDE = {  # methods that have room for 2 k latents a row there, or for 256 where they have no k
    "batch_topk": BatchTopK(768, 32768, 32, **HALF),
    "mutual_choice": MutualChoice(768, 32768, 32, **HALF),
    "batch_crosscoder": BatchCrosscoder(768, 32768, k=32, **HALF),
    "matryoshka": Matryoshka(768, 32768, 32, **HALF),
    "jump_relu, l0_target": JumpReLU(768, 32768, l0_target=32.0, **HALF),
    "jump_relu": JumpReLU(768, 32768, **HALF),
}


@pytest.mark.parametrize("name", WIDE)
def test_the_sparse_way_is_priced_where_it_is_taken(name):
    """0.522 matmul, 0.002 for what 64 of a row are written and read as, or 0.008 for 256, 0.001 for
    a cut, 0.099 decode, 0.211 backward, 0.304 Adam, 0.003 batch: ms on an H200 by hand.
    """
    found = cost.step(WIDE[name], 8192, ONE, cost.hardware("h200"))
    hand = 0.522 + 0.099 + 0.211 + 0.304 + 0.003
    hand += 0.008 if "jump" in name else 0.002 + 0.001
    hand += 4 * 8192 * 768 * 4 / 4.3e12 * 1e3 if name == "matryoshka" else 0
    assert 1e3 * found.seconds == pytest.approx(hand, rel=0.005)
    assert found.seconds < 1.06 * floor(768, 32768, 32, 8192).seconds


def test_the_dense_way_is_priced_where_it_is_taken():
    h200 = cost.hardware("h200")
    few, told = BatchTopK(768, 1008, 32, **HALF), BatchTopK(768, 32768, 32, capacity=0, **HALF)
    for sae in (few, told):
        c = cost.step(sae, 4096, ONE, h200)
        assert sum(t.term.flops for t in c.terms) == 10 * 4096 * 768 * sae.n
    narrow, densely, sparsely = (
        cost.step(JumpReLU(768, 1008, capacity=c), 4096, ONE, h200).seconds for c in (None, 0, 64)
    )
    assert narrow == densely != sparsely


def test_latents_in_use_can_be_told():
    h200, sae = cost.hardware("h200"), WIDE["jump_relu"]
    base, more = (seconds(cost.step(sae, 8192, ONE, h200, active=a)) for a in (20, 80))
    assert more["decode"] / base["decode"] == pytest.approx(
        (2 * 80 + 4) / (2 * 20 + 4)  # bytes an entry of a row: gathered ones, and y written
    )
    assert more["selection"] == base["selection"]


@pytest.mark.parametrize("model", [1, 4])
@pytest.mark.parametrize("n", [1024, 8192, 65536])
@pytest.mark.parametrize("name", ["batch_topk", "mutual_choice", "jump_relu", "matryoshka"])
def test_the_rules_are_those_of_the_methods(name, n, model, monkeypatch):
    """What a method asks ``selection.room_for`` for while its loss is traced on a shard."""
    asked = []
    real = selection.room_for

    def spy(*args):
        asked.append(real(*args))
        return asked[-1]

    monkeypatch.setattr(selection, "room_for", spy)
    for sae in (SAES[name](16, n), *([Matryoshka(16, n, sampled=3)] if name[0:3] == "mat" else [])):
        asked.clear()
        trace_loss(sae, model)
        assert asked == [room(sae, model)], sae


def trace_loss(sae, model):
    """The loss is traced for a mesh of ``model`` shards; nothing is computed."""
    from saex.sharding import make_mesh
    from saex.train.optim import Optim
    from saex.train.state import abstract_state
    from saex.train.step import hyper_arrays

    mesh = make_mesh(MeshConfig(1, model))
    with jax.set_mesh(mesh):
        state = abstract_state(sae, Optim().transformation(), mesh)
        x = jax.ShapeDtypeStruct((8, 16), "float32", sharding=jax.NamedSharding(mesh, jax.P()))
        hyper = jax.eval_shape(lambda: hyper_arrays(sae, Optim(), 10))
        rest = jax.eval_shape(lambda: (jax.random.key(0), jax.numpy.int32(0)))
        args = state.params, state.stats, {"x": x, "y": x}, *rest, hyper
        jax.clear_caches()
        jax.eval_shape(lambda *a: sae.loss(*a), *args)


def test_a_device_gathers_its_share_of_the_latents_in_use():
    assert slots(TopK(64, 4096, 32)).used == 32
    split = slots(TopK(64, 4096, 32), model=4)
    assert (split.chosen, split.used) == (32, 8)
    assert slots(ReLU(64, 1008)).chosen == 0


def test_rows_of_several_sites_are_examples_of_their_own():
    one, three = (MultiLayer(64, 4096, sites=s, **HALF) for s in (1, 3))
    a, b = (seconds(cost.step(sae, 4096, ONE, cost.hardware("h200"))) for sae in (one, three))
    assert b["encoder matmul"] == pytest.approx(3 * a["encoder matmul"], rel=0.01)
    assert b["optimiser"] == a["optimiser"]


@pytest.mark.parametrize("name", SAES)
def test_every_method_has_a_price(name):
    from tests.sae.small import small

    assert 0 < cost.step(small(name, n=1024), 64, ONE, cost.hardware("v5e")).seconds < 1e-3


# ------------------------------------------------------------------------------------------ stacks


def stack_of(members, supply=None, mesh=ONE, shape=(768, 24576, 32, 4096)):
    d, n, k, b = shape
    sae = TopK(d, n, k, **HALF)
    return cost.step(sae, b, mesh, cost.hardware("h200"), members=members, supply=supply)


def test_a_stack_shares_the_batch_and_nothing_else():
    one, eight = stack_of(1), stack_of(8)
    shared = 2 * 4096 * 768 / 4.3e12  # the rows are written once
    assert eight.seconds == pytest.approx(8 * (one.seconds - shared) + shared, rel=1e-12)
    assert eight.gain == pytest.approx(8 * one.seconds / eight.seconds)
    assert 1 < eight.gain < 1.005  # nothing to gain where a step is its members' own work
    assert eight.tokens_per_second == pytest.approx(4096 / eight.seconds)
    assert one.gain == 1


def test_a_stack_gains_where_the_supply_of_rows_is_the_bound():
    """At 1.5 million rows a second 4096 rows take 2.73 ms, a step of one member 0.592."""
    one, four, eight = (stack_of(m, supply=1.5e6) for m in (1, 4, 8))
    assert 1e3 * one.seconds == pytest.approx(2.731, rel=1e-3)
    assert four.seconds == one.seconds and four.gain == pytest.approx(4)
    assert 1e3 * eight.seconds == pytest.approx(8 * 0.591, rel=0.005)
    assert eight.gain == pytest.approx(8 * 2.731 / (8 * 0.591), rel=0.005)
    assert stack_of(8, supply=1e9).gain == stack_of(8).gain


def test_a_small_dictionary_gains_more_than_a_large_one():
    """Of n latents the batch's share is about R / n of the matmul's, R = 184 FLOP a byte."""
    gains = [stack_of(8, shape=(768, n, 8, 65536)).gain for n in (256, 1024, 24576)]
    assert gains[0] > gains[1] > gains[2] > 1
    batch = 2 * 65536 * 768 / 4.3e12
    matmul = 2 * 65536 * 768 * 256 / 790e12
    assert batch / matmul == pytest.approx(790 / 4.3 / 256, rel=1e-6)


def test_members_on_places_of_their_own_work_side_by_side():
    places = MeshConfig(sweep=4)
    eight, one = stack_of(8, mesh=places), stack_of(1)
    own = one.seconds - 2 * 4096 * 768 / 4.3e12
    assert eight.seconds == pytest.approx(one.seconds + own, rel=1e-9)  # two on each place
    assert eight.gain == pytest.approx(2 * one.seconds / eight.seconds, rel=1e-9)
    # four runs side by side would each get a quarter of the rows
    assert stack_of(4, supply=1.5e6, mesh=places).gain == pytest.approx(4)
    with pytest.raises(ValueError, match=r"members=3.*mesh\.sweep=4"):
        stack_of(3, mesh=places)


def test_the_command_prices_all_members(capsys):
    config = "--config=experiments/quickstart.py"
    members = "--config.members=[{'seed': 1}, {'seed': 2}, {'seed': 3}]"
    assert cli.main(["info", config, "--hardware=h200", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    argv = ["info", config, "--hardware=h200", members]
    assert cli.main([*argv, "--json"]) == 0
    three = json.loads(capsys.readouterr().out)
    batch = one["terms"]["batch"]["seconds"]
    assert three["seconds"] == pytest.approx(3 * one["seconds"] - 2 * batch)
    assert three["terms"]["optimiser"]["times"] == three["members"] == 3
    assert cli.main([*argv, "--supply=1e5"]) == 0
    out = capsys.readouterr().out
    assert "each for 3 members; 3.00 times runs of their own" in out
    assert f"{1e3 * 4096 / 1e5:,.3f}" in out


# ------------------------------------------------------------------------------------- single ops


def test_ops_have_floors_of_their_own():
    b, d, n, k = 4096, 768, 24576, 32
    h200 = cost.hardware("h200")
    found = {name: cost.op(name, b, d, n, k, h200) for name in cost.OPS}
    W = 4.3e12
    assert found["top_k"] == pytest.approx((4 * b * n + 8 * b * k) / W)
    assert found["adam"] == pytest.approx(28 * 2 * n * d / W)
    # every row of W_dec is read once at least, the slots and y as they come
    assert found["decode"] == pytest.approx((4 * n * d + 4 * b * d + 8 * b * k) / W)
    few = cost.op("decode", 64, d, n, k, h200)
    assert few == pytest.approx((4 * 64 * k * d + 4 * 64 * d + 8 * 64 * k) / W)
    assert found["encode"] > 2 * b * d * n / 395e12  # TF32, and the selection
    assert found["encode"] == pytest.approx(
        sum(
            seconds(floor(*(d, n, k, b), dtype="float32"))[t]
            for t in ("encoder matmul", "selection")
        )
    )


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
