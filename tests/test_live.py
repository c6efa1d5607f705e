"""Training straight from the subject model: the rows, their order, resumes, errors."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from saex.harvest import harvest
from saex.live import Live, open_rows
from saex.registry import ConfigError
from tests import live_cases
from tests.live_cases import BATCH, CFG, LIVE, STREAM, Letters, Toy, rows_of, same

stored, opened = live_cases.stored, live_cases.opened


def numbers(batch, stored):
    """The rows of a batch by their numbers in the harvest: no document has two contexts."""
    keys = zip(stored.read("document").tolist(), stored.read("position").tolist())
    number = {key: i for i, key in enumerate(keys)}
    assert len(number) == stored.rows
    return [number[key] for key in zip(batch["document"].tolist(), batch["position"].tolist())]


def test_rows_are_those_of_a_harvest_bit_for_bit(tmp_path, stored):
    rows = rows_of(tmp_path)
    assert rows.rows == stored.rows and set(rows.columns) == set(stored.columns)
    for name in rows.columns:
        assert rows.read(name).tobytes() == stored.read(name).tobytes(), name
        assert (rows.read(name, 5, 107) == stored.read(name, 5, 107)).all()
    assert not list(tmp_path.iterdir())


def test_a_window_gives_each_row_once_and_windows_are_disjoint(tmp_path, opened, stored):
    config = dataclasses.replace(STREAM, lanes=1, exclude_positions=())
    rows = rows_of(tmp_path)
    stream = opened(rows, config)
    epoch = stream.gather(0, stream.rows)
    order = numbers(epoch, stored)
    assert sorted(order) == list(range(stored.rows))
    bounds, at = rows.chunks(), 0
    for chunks in stream.windows(stream.rows - 16, 0):
        inside = [i for chunk in chunks for i in range(*bounds[chunk])]
        got, at = order[at : at + len(inside)], at + len(inside)
        assert sorted(got) == sorted(inside) and got != sorted(got)
    assert at == stored.rows
    for name in ("early", "tokens"):
        assert (epoch[name] == stored.read(name)[order]).all()


def test_the_text_begins_again_in_another_order(tmp_path, opened):
    stream = opened(rows_of(tmp_path), dataclasses.replace(STREAM, lanes=1))
    epochs = [stream.gather(e * stream.rows, (e + 1) * stream.rows)["early"] for e in range(3)]
    ranks = [sorted(x.tobytes() for x in epoch) for epoch in epochs]
    assert ranks[0] == ranks[1] == ranks[2]
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def first_steps(stream, start, count):
    iterator = stream.iterate(start)
    batches = [{n: np.array(x) for n, x in next(iterator).items()} for _ in range(count)]
    iterator.close()
    return batches


def windows_made(stream):
    """Of each lane the windows that are made from now on, as (epoch, window)."""
    made = []
    for windows in stream._lanes._windows[0]:
        keys, read = [], windows._read
        windows._read = lambda *key, keys=keys, read=read: keys.append(key) or read(*key)
        made.append(keys)
    return made


@pytest.mark.parametrize("threads", [0, 1])
def test_going_on_at_any_step_is_the_unbroken_run_and_makes_two_windows_again_at_most(
    tmp_path, opened, threads
):
    """Of each lane: the one that was in use and the one that was made ahead."""
    config = dataclasses.replace(STREAM, threads=threads, prefetch=1)
    unbroken = opened(rows_of(tmp_path), config)
    epoch = int(unbroken.steps_per_epoch)
    whole = first_steps(unbroken, 0, 2 * epoch + 4)
    edges = np.cumsum([16 * BATCH // 2] * 3) // 16  # about where windows end, and an epoch
    for start in (0, 1, *edges.tolist(), *(edges + 1).tolist(), epoch - 1, epoch, epoch + 1):
        rows = rows_of(tmp_path)
        stream = opened(rows, config)
        made, orders = windows_made(stream), stream._lanes._orders[0]
        for got, expected in zip(first_steps(stream, start, 2), whole[start : start + 2]):
            same(got, expected)
        stream.close()
        share = 16 // STREAM.lanes
        for keys, order in zip(made, orders):
            before = [(p.epoch, p.window) for p in order.pieces(0, start * share)]
            ahead = [order.after(*key) for key in before[-1:]]
            again = [key for key in keys if key in before + ahead]
            assert set(again) <= {*before[-1:], *ahead} and len(again) <= 2, start
        passes = [len(order.chunks(*k)[0]) for keys, order in zip(made, orders) for k in keys]
        assert rows.made == sum(passes), start  # and nothing else


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_their_own_lanes_and_together_the_same_batches(tmp_path, opened, processes):
    config = dataclasses.replace(STREAM, lanes=4)
    whole, share = opened(rows_of(tmp_path), config), 16 // processes
    sources = [rows_of(tmp_path) for _ in range(processes)]
    parts = [opened(source, config) for source in sources]
    last = int(whole.steps_per_epoch)
    for step in range(last):
        rows = [
            part.gather(step * 16 + p * share, step * 16 + (p + 1) * share)
            for p, part in enumerate(parts)
        ]
        expected = whole.gather(step * 16, (step + 1) * 16)
        same({n: np.concatenate([r[n] for r in rows]) for n in expected}, expected)
    chunks = len(sources[0].chunks())
    for part, source in zip(parts, sources):
        part.close()
        # its share, the chunks at its edges, and what it made ahead
        assert source.made <= chunks / processes + 2 * 4 + 2


def test_several_sites_are_made_by_one_forward_pass(tmp_path, opened, stored):
    rows = rows_of(tmp_path)
    config = dataclasses.replace(STREAM, lanes=1, threads=0)
    columns = {"x": "early", "y": "late", "both": "early+late"}
    stream = opened(rows, config, {**columns, "document": "document", "position": "position"})
    batches = [stream.gather(i, i + 50) for i in range(0, 150, 50)]
    got = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
    order, x, y = numbers(got, stored), got["x"], got["y"]
    assert (x == stored.read("early")[order]).all() and (y == stored.read("late")[order]).all()
    assert (got["both"] == np.concatenate([x, y], 1)).all()
    stream.close()
    windows = list(stream.windows(stream.rows, 0))
    seen = list(stream.windows(150, 0))
    assert rows.made <= sum(map(len, windows[: len(seen) + 1]))


def test_the_next_windows_are_made_meanwhile_and_no_third_is_held(tmp_path, opened):
    rows = rows_of(tmp_path)
    stream = opened(rows)
    iterator = stream.iterate()
    next(iterator)
    each = STREAM.window // STREAM.lanes
    deadline = time.monotonic() + 30
    while rows.made < 2 * STREAM.lanes * each and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rows.made >= 2 * STREAM.lanes * each
    for _ in range(60):
        next(iterator)
        held = [len(w._slots) for windows in stream._lanes._windows for w in windows]
        assert max(held) <= 2
    iterator.close()


def test_a_model_of_transformers_gives_the_rows_of_its_harvest(tmp_path):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    pytest.importorskip("transformers", reason="the extra torch is not installed")
    from saex.models import HuggingFace
    from tests.models import tiny

    tiny.make("llama").save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    model, params = HuggingFace(str(tmp_path / "llama"), device="cpu").load()
    sites, cfg = (
        ("blocks.0.mlp_out", "blocks.1.resid_post"),
        dataclasses.replace(CFG, shuffle=False),
    )
    given = model, params, Letters()
    stored = harvest(*given, "train", tmp_path / "store", cfg, sites=sites)
    rows = open_rows(*given, tmp_path / "tee", cfg, LIVE, sites=sites)
    for name in stored.columns:
        assert rows.read(name).tobytes() == stored.read(name).tobytes(), name
    host, device = (
        dataclasses.replace(STREAM, on_device=on).open(rows, {"x": sites[1]}, 0)
        for on in (False, True)
    )
    same(device.batch_at(3), host.batch_at(3))
    host.close()
    device.close()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_model_on_other_devices_makes_the_same_rows(tmp_path, stored, count):
    rows = rows_of(tmp_path, live=Live(enabled=True, devices=count))
    used = set()
    forward = rows._forward
    rows._forward = lambda params, tokens: used.add(tokens.device) or forward(params, tokens)
    assert (rows.read("early") == stored.read("early")).all()
    assert used == set(jax.local_devices()[-count:])


def test_devices_for_a_model_that_is_no_jax_program_are_refused(tmp_path):
    class Torch(Toy):
        traceable = False

    with pytest.raises(ConfigError, match=r"live.devices=2: this subject model is no JAX program"):
        rows_of(tmp_path, model=Torch(), live=Live(enabled=True, devices=2))
    assert rows_of(tmp_path, model=Torch()).rows > 0


def test_by_default_the_model_is_on_the_devices_of_the_mesh(tmp_path, opened):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    rows = rows_of(tmp_path, mesh=mesh)
    used = set()
    forward = rows._forward
    rows._forward = lambda params, tokens: used.add(tokens.device) or forward(params, tokens)
    stream = opened(rows, mesh=mesh)
    batch = next(stream.iterate())
    assert used == set(jax.devices()[:4])
    assert batch["early"].sharding == jax.NamedSharding(mesh, jax.P("data"))
    same(batch, opened(rows_of(tmp_path)).gather(0, 16))


@pytest.mark.parametrize(("shape", "lanes"), [(None, 2), ((2, 2), 4)])
def test_windows_on_devices_give_the_same_batches(tmp_path, opened, shape, lanes):
    mesh = None
    if shape is not None:
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("data", "model"), devices=devices)
    config = dataclasses.replace(STREAM, lanes=lanes, on_device=True)
    columns = {"x": "early", "both": "early+late", "tokens": "tokens"}
    stream = opened(rows_of(tmp_path, mesh=mesh), config, columns, mesh=mesh, dtype="bfloat16")
    host = dataclasses.replace(config, on_device=False)
    plain = opened(rows_of(tmp_path, mesh=mesh), host, columns, mesh=mesh, dtype="bfloat16")
    for step in (0, 1, 2, 3, int(plain.steps_per_epoch), 7):
        got, expected = stream.batch_at(step), plain.batch_at(step)
        same(got, expected)
        assert {n: x.sharding for n, x in got.items()} == {
            n: x.sharding for n, x in expected.items()
        }
    same(stream.sample(40), plain.sample(40))


def test_windows_on_devices_go_on_at_any_step(tmp_path, opened):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    config = dataclasses.replace(STREAM, on_device=True)
    whole = first_steps(opened(rows_of(tmp_path, mesh=mesh), mesh=mesh), 0, 70)
    for start in (4, 33):
        rows = rows_of(tmp_path, live=Live(enabled=True, devices=1), mesh=mesh)
        with jax.set_mesh(mesh), jax.transfer_guard_host_to_device("disallow"):
            batches = first_steps(opened(rows, config, mesh=mesh), start, 10)
        for got, expected in zip(batches, whole[start : start + 10]):
            same(got, expected)


def test_nan_on_devices_is_refused(tmp_path, opened):
    rows = rows_of(tmp_path, model=Toy(nan_token=ord("r")))
    config = dataclasses.replace(STREAM, on_device=True)
    with pytest.raises(ValueError, match=r"late.* is NaN or infinite in documents \d+ to \d+"):
        first_steps(opened(rows, config, columns=("early",)), 0, 60)


# -------------------------------------------------------------------------------- ends and errors


def test_nothing_is_made_beyond_the_end_of_the_run(tmp_path, opened):
    rows = rows_of(tmp_path)
    stream = opened(rows)
    rows.plan(stream, steps=3)
    needed = sum(len(w) for lane in (0, 1) for w in stream.windows(3 * 16, lane))
    iterator = stream.iterate()
    for _ in range(3):
        next(iterator)
    iterator.close()
    stream.close()
    assert rows.made == needed < len(rows.chunks())


@pytest.mark.parametrize("threads", [0, 1])
def test_an_error_inside_the_model_comes_out_of_the_loop_with_its_place(tmp_path, opened, threads):
    rows = rows_of(tmp_path)
    forward, calls = rows._forward, []

    def failing(params, tokens):
        calls.append(1)
        if len(calls) >= 7:  # a failed window is tried once more
            raise ValueError("out of memory while trying to allocate")
        return forward(params, tokens)

    rows._forward = failing
    iterator = opened(rows, dataclasses.replace(STREAM, threads=threads)).iterate()
    message = r"the subject model failed at documents \d+ to \d+ of the training text.*out of mem"
    with pytest.raises(RuntimeError, match=message):
        for _ in range(60):
            next(iterator)
    iterator.close()


def test_nan_activations_are_refused_with_their_place(tmp_path, opened):
    rows = rows_of(tmp_path, model=Toy(nan_token=ord("r")))
    iterator = opened(rows, columns=("early",)).iterate()  # seen though `late` is not streamed
    with pytest.raises(ValueError, match=r"late.* is NaN or infinite in documents \d+ to \d+"):
        for _ in range(60):
            next(iterator)
    iterator.close()
