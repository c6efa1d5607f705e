"""Training straight from the subject model: the rows, their order, resumes, errors, the tee."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex import loop, metrics
from saex.checkpoint import info
from saex.data import Store, StoreError, StoreWriter
from saex.data.stream import Stream
from saex.harvest import Harvest, harvest
from saex.live import Live, open_rows
from saex.registry import ConfigError
from tests import runs

CONTEXT, BATCH = 12, 4
SITES = ("early", "late")
LIVE, TEE = Live(enabled=True), Live(enabled=True, tee=True)
STREAM = Stream(batch=16, window=4, lanes=2)
CFG = Harvest(rows=10_000, batch=BATCH, segment_rows=100, chunk_rows=16, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Toy:
    """A stand-in subject model. `late` is computed after `early`; a letter may be poison."""

    context: int = CONTEXT
    nan_token: int = -1

    @property
    def sites(self):
        return {"early": 8, "late": 4, "never": 4}

    def run(self, params, tokens, taps=(), edits=None, stop_at=None):
        assert tokens.shape == (BATCH, self.context)
        mixed = jnp.cumsum(params["embed"][tokens], axis=1)
        early = jnp.sin(mixed)
        late = jnp.where((tokens == self.nan_token)[..., None], jnp.nan, jnp.cos(early[..., :4]))
        acts = {"early": early, "late": late}
        return None, {site: acts[site] for site in taps}


@dataclasses.dataclass(frozen=True)
class Letters:
    def documents(self, split):
        from saex.data.text import Document

        for i in range(100):  # each is one context
            yield Document(f"{split}-{i}", f"{i}" + "nopqrstuvwxyz"[: 2 + i % 7])

    def digest(self, split):
        return split


MODEL = Toy()
PARAMS = {"embed": jax.random.normal(jax.random.key(0), (257, 8))}


def rows_of(tmp_path, cfg=CFG, live=LIVE, model=MODEL, sites=SITES, **kwargs):
    return open_rows(model, PARAMS, Letters(), tmp_path, cfg, live, sites=sites, **kwargs)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same rows, harvested; about 25 chunks of 4 contexts."""
    cfg = dataclasses.replace(CFG, shuffle=False)
    path = tmp_path_factory.mktemp("stored") / "store"
    return harvest(Toy(), PARAMS, Letters(), "train", path, cfg, sites=SITES)


@pytest.fixture
def opened():
    streams = []

    def open_stream(rows, config=STREAM, columns=("early", "document", "position", "tokens"), **kw):
        streams.append(config.open(rows, columns, kw.pop("seed", 0), **kw))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def numbers(batch, stored):
    """The rows of a batch by their numbers in the harvest: no document has two contexts."""
    keys = zip(stored.read("document").tolist(), stored.read("position").tolist())
    number = {key: i for i, key in enumerate(keys)}
    assert len(number) == stored.rows
    return [number[key] for key in zip(batch["document"].tolist(), batch["position"].tolist())]


def same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


# --------------------------------------------------------------------------------------- the rows


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


def test_going_on_at_any_step_is_the_unbroken_run_and_makes_two_windows_at_most(tmp_path, opened):
    unbroken = opened(rows_of(tmp_path))
    epoch = int(unbroken.steps_per_epoch)
    whole = first_steps(unbroken, 0, 2 * epoch + 4)
    edges = np.cumsum([16 * BATCH // 2] * 3) // 16  # about where windows end, and an epoch
    for start in (0, 1, *edges.tolist(), *(edges + 1).tolist(), epoch - 1, epoch, epoch + 1):
        rows = rows_of(tmp_path)
        stream = opened(rows)
        for got, expected in zip(first_steps(stream, start, 2), whole[start : start + 2]):
            same(got, expected)
        stream.close()
        window = STREAM.window // STREAM.lanes
        assert rows.made <= 2 * STREAM.lanes * 2 * window, start


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


# ---------------------------------------------------------------------------------------- the tee


def train_on(rows, stream, first, steps):
    """What a run does with a live source."""
    rows.plan(stream, steps)
    iterator = stream.iterate(first)
    for _ in range(first, steps):
        next(iterator)
    iterator.close()
    stream.close()


def contents(store):
    """Every row of a store as bytes of all its columns, sorted."""
    columns = [store.read(name).reshape(store.rows, -1) for name in sorted(store.columns)]
    return sorted(b"".join(c[i].tobytes() for c in columns) for i in range(store.rows))


def needed_rows(stored, rows, stream, steps):
    """What a tee must hold after so many steps: all rows of the chunks of their windows."""
    bounds = rows.chunks()
    windows = [w for lane in (0, 1) for w in stream.windows(steps * 16, lane)]
    chunks = {int(c) for window in windows for c in window}
    whole = contents(stored)
    inside = [i for c in chunks for i in range(*bounds[c])]
    columns = [stored.read(n).reshape(stored.rows, -1) for n in sorted(stored.columns)]
    assert len(whole) == stored.rows
    return sorted(b"".join(c[i].tobytes() for c in columns) for i in inside)


@pytest.mark.parametrize(
    ("steps", "on_device"), [(3, False), (30, False), (200, False), (30, True)]
)
def test_the_tee_holds_the_rows_of_the_windows_that_were_trained_on(
    tmp_path, opened, stored, steps, on_device
):
    rows = rows_of(tmp_path / "tee", live=TEE)
    stream = opened(rows, dataclasses.replace(STREAM, on_device=on_device))
    train_on(rows, stream, 0, steps)
    rows.finish()
    rows.close()
    store = Store.open(tmp_path / "tee")
    store.verify()
    assert store.complete and len(store.manifest.segments) > (steps > 3)
    assert contents(store) == needed_rows(stored, rows, stream, steps)
    assert (store.rows < stored.rows) == (steps < 50)


def test_the_tee_after_kills_holds_each_row_once(tmp_path, opened, stored):
    """Each attempt goes on at some step; rows in memory that were not committed are lost."""
    for first, steps in ((0, 9), (5, 20), (20, 33), (0, 12)):
        rows = rows_of(tmp_path / "tee", live=TEE)
        stream = opened(rows)
        rows.plan(stream, 40)
        iterator = stream.iterate(first)
        for _ in range(first, steps):
            next(iterator)
        iterator.close()
        stream.close()
        rows.close()  # as a kill leaves it: nothing is finished, the lock is gone
    assert not Store.open(tmp_path / "tee").complete
    rows = rows_of(tmp_path / "tee", live=TEE)
    stream = opened(rows)
    rows.plan(stream, 40)
    rows.finish()
    store = Store.open(tmp_path / "tee")
    store.verify()
    assert contents(store) == needed_rows(stored, rows, stream, 40)
    # somebody deletes a damaged segment: it is made again
    rows.close()
    shutil.rmtree(tmp_path / "tee" / store.manifest.segments[1].path)
    rows = rows_of(tmp_path / "tee", live=TEE)
    rows.plan(opened(rows), 40)
    rows.finish()
    rows.close()
    assert Store.open(tmp_path / "tee").digest == store.digest


def test_a_full_disk_under_the_tee_is_said_and_nothing_is_lost(
    tmp_path, opened, stored, monkeypatch
):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    rows = rows_of(tmp_path / "tee", live=TEE)
    stream = opened(rows)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_write_files", full)
        with pytest.raises(StoreError, match=r"could not write \d+ rows .*No space left"):
            train_on(rows, stream, 0, 30)
            rows.finish()
        stream.close()
    rows.close()
    rows = rows_of(tmp_path / "tee", live=TEE)
    stream = opened(rows)
    train_on(rows, stream, 0, 30)
    rows.finish()
    rows.close()
    assert contents(Store.open(tmp_path / "tee")) == needed_rows(stored, rows, stream, 30)


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs.write_text(folder / "text")
    runs.write_model(folder / "model.safetensors")
    return folder


def mapping(folder, **changes):
    """A live run of 60 steps of 64 rows over 2000 rows of text."""
    default = {"steps": 60, "harvest__rows": 2000, "live__enabled": True, "checkpoint__every": 7}
    default |= {"stream__lanes": 2, "stream__window": 4, "log__every": 10}
    return runs.mapping(folder, **{**default, **changes})


def config(folder, **changes):
    from saex.config import resolve

    return resolve(mapping(folder, **changes))


@pytest.fixture(scope="module")
def unbroken(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_run", lambda folder: {})
        loop.train(config(folder, live__tee=True), folder / "unbroken")
    return folder / "unbroken"


@pytest.fixture
def unjudged(monkeypatch):
    """Runs without an evaluation, which takes longer than they do."""
    monkeypatch.setattr(loop, "evaluate_run", lambda folder: {})


def test_a_live_run_keeps_no_training_rows_and_says_how_often_the_text_is_read(
    folder, unbroken, caplog
):
    with caplog.at_level("INFO", "saex"):
        loop.train(config(folder, eval__controls=True), folder / "plain")
    assert not (folder / "plain" / "store" / "train").exists()
    assert re.search(r"rows of text for 1\.9\d+ epochs", caplog.text)
    assert "it is read again, in another order" in caplog.text
    assert "no controls" in caplog.text
    result = json.loads((folder / "plain" / "eval.json").read_text())
    assert result["fvu"] < 1.5 and np.isfinite(result["ce_reconstructed"])
    # writing the rows as well changes nothing
    assert info(folder / "plain")["state_digest"] == info(unbroken)["state_digest"]


class Killed(BaseException):
    """As far as the run can tell, the end of the process."""


def test_killed_and_gone_on_is_the_unbroken_run(folder, unbroken, unjudged, monkeypatch):
    """Also where the model is on other devices at the end."""
    workdir, update = folder / "broken", metrics.Progress.update

    def kill(self, done, note=""):
        if self.what == "train" and done == 40:
            raise Killed
        update(self, done, note)

    monkeypatch.setattr(metrics.Progress, "update", kill)
    with pytest.raises(Killed):
        loop.train(config(folder, live__tee=True), workdir)
    monkeypatch.setattr(metrics.Progress, "update", update)
    loop.train(config(folder, live__tee=True, live__devices=2), workdir)
    assert info(workdir)["state_digest"] == info(unbroken)["state_digest"]
    stores = [Store.open(path / "store" / "train") for path in (workdir, unbroken)]
    stores[0].verify()
    assert contents(stores[0]) == contents(stores[1])


def test_a_second_run_on_the_tees_store_works(folder, unbroken, unjudged):
    from saex import cli

    assert cli.main(["store", "verify", str(unbroken / "store" / "train")]) == 0
    changes = {"store": str(unbroken / "store"), "live__enabled": False, "steps": 12}
    loop.train(config(folder, **changes), folder / "second")
    assert info(folder / "second")["step"] == 12


@pytest.mark.slow
def test_kill_9_and_going_on_is_the_unbroken_run(folder):
    path = folder / "killed.py"
    changes = {"live__tee": True, "steps": 30, "checkpoint__every": 3}
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({mapping(folder, **changes)!r})\n"
    )
    workdir, reference = folder / "killed", folder / "not_killed"
    run = [sys.executable, "-m", "saex.cli", "train", f"--config={path}"]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen([*run, f"--workdir={workdir}"], **quiet) as process:
        deadline = time.time() + 240
        while not list((workdir / "checkpoints").glob("[3-9]/meta")) and time.time() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (workdir / "DONE.json").exists()
    for each in (workdir, reference):
        subprocess.run([*run, f"--workdir={each}"], check=True, timeout=300, **quiet)
    assert info(workdir)["state_digest"] == info(reference)["state_digest"]
    stores = [Store.open(each / "store" / "train") for each in (workdir, reference)]
    stores[0].verify()
    assert contents(stores[0]) == contents(stores[1])


@pytest.mark.slow
def test_a_longer_run_of_a_complete_tee_goes_on_without_it(folder, unbroken, unjudged, caplog):
    shutil.copytree(unbroken, folder / "longer")
    with caplog.at_level("INFO", "saex"):
        loop.train(config(folder, live__tee=True, steps=62), folder / "longer", extend=True)
    assert info(folder / "longer")["step"] == 62 and "is complete" not in caplog.text
    store = Store.open(folder / "longer" / "store" / "train")
    assert store.digest == Store.open(unbroken / "store" / "train").digest


@pytest.mark.slow
def test_a_stack_trains_on_one_live_stream(folder):
    members = [{"seed": 0}, {"seed": 1}]
    result = loop.train(config(folder, members=members, steps=8), folder / "stack")
    assert set(result["members"]) == {"00", "01"}
    assert all(np.isfinite(each["fvu"]) for each in result["members"].values())
    digests = [info(folder / "stack" / "members" / m)["params_digest"] for m in ("00", "01")]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_two_processes_train_and_write_like_one(folder, tmp_path):
    changes = {"log__every": 1, "steps": 40, "live__tee": True}
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({mapping(folder, **changes)!r})\n"
    )
    run = [sys.executable, "-m", "saex.cli", "train", f"--config={path}", "--config.mesh.data=2"]
    quiet = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    subprocess.run([*run, f"--workdir={tmp_path / 'one'}"], check=True, timeout=300, **quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"SAEX_COORDINATOR": f"127.0.0.1:{port}", "SAEX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [*run, f"--workdir={tmp_path / 'two'}"],
            env={**os.environ, **names, "SAEX_PROCESS_ID": str(i)},
            **quiet,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-2000:]
    finally:
        for process in processes:
            process.kill()
    one, two = (
        [line["loss"] for line in metrics.read(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    )
    assert len(one) == 40
    np.testing.assert_allclose(two, one, rtol=1e-5)
    stores = [Store.open(tmp_path / name / "store" / "train") for name in ("one", "two")]
    stores[1].verify()
    assert contents(stores[0]) == contents(stores[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"live__devices": -1}, "live.devices=-1"),
        ({"stream__max_norm": 5.0}, r"live.enabled with stream.max_norm=5.0: the median"),
        ({"subject": None}, "live.enabled with subject=None"),
        ({"harvest__non_finite": "drop"}, "live.enabled with harvest.non_finite='drop'"),
        ({"live__enabled": False, "live__tee": True}, "live.tee=True without live.enabled"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(folder, **changes)


def test_what_the_machine_or_the_call_lacks_is_named(folder, unbroken, tmp_path):
    with pytest.raises(ConfigError, match=r"live.devices=9: this process has 8 devices"):
        loop.train(config(folder, live__devices=9), tmp_path / "run")
    with pytest.raises(ConfigError, match="rows come from the one or the other"):
        loop.train(config(folder, store=str(unbroken / "store")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_other_processes_began_is_not_gone_on_with(tmp_path, opened):
    rows = rows_of(tmp_path / "tee", live=TEE)
    with rows._tee._open(part=(0, 2)) as writer:
        writer.commit({"chunks": []})
    with pytest.raises(StoreError, match="was begun by 2 processes, here are 1"):
        rows.plan(opened(rows), 3)
    rows.close()
