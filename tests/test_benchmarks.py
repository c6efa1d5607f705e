"""The benchmarks' own arithmetic; with -m slow, that those which need no peers run."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name, as Python does that is given its path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_waiting_is_weighted_by_time(script):
    lines = [
        {"step": 1, "step_seconds": 9.0, "wait_share": 1.0},  # compiles; not counted
        {"step": 11, "step_seconds": 1.0, "wait_share": 0.5},
        {"step": 21, "step_seconds": 3.0, "wait_share": 0.1},
    ]
    found = script("harvest").share(lines, after=1)
    assert found["wait_share"] == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert found["step_seconds"] == pytest.approx(2.0)
    assert found["steps_measured"] == 20


def test_a_call_inside_a_call_is_timed_once(script, monkeypatch):
    class Writer:
        def commit(self):
            return "committed"

        def finish(self):
            return self.commit()

    harvest = script("harvest")
    clock = iter(range(100))
    monkeypatch.setattr(harvest.time, "perf_counter", lambda: next(clock))
    with harvest.timed(Writer, ("commit", "finish")) as spent:
        assert Writer().finish() == Writer().commit() == "committed"
    assert spent == {"commit": 1, "finish": 1}
    Writer().finish()
    assert sum(spent.values()) == 2  # afterwards the class is as before


def test_permuted_rows_come_once_an_epoch_and_anew_in_the_next(script):
    numbers = np.arange(40, dtype=np.float32)
    columns = {
        "position": np.arange(40) % 4,
        "document": np.arange(40),
        "blocks.1.resid_post": numbers[:, None],
    }
    store = SimpleNamespace(read=columns.__getitem__)
    order = script("stream_quality").Permuted(store, (0,), 8, seed=3)
    assert order.rows == 30
    batches = [order.gather(8 * i, 8 * i + 8) for i in range(15)]
    rows = np.concatenate([b["x"][:, 0] for b in batches])
    epochs = rows.reshape(4, 30)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), numbers[np.arange(40) % 4 != 0])
    assert (epochs[0] != epochs[1]).any()
    assert all((b["x"][:, 0] == b["document"]).all() for b in batches)


def test_rows_of_every_store_say_their_context(script):
    peers = script("store_peers")
    rows = np.concatenate([b.copy() for b in peers.blocks(100_096, 4)])
    np.testing.assert_array_equal(peers.contexts_of(rows), np.arange(100_096) // 128)
    assert (rows == rows.astype(np.float16)).all()  # also what float16 holds


def test_rows_and_latents_are_heavy_tailed(script):
    measure = script("measure")
    values, indices = measure.zipf_codes(512, 2048, 16)
    assert values.shape == indices.shape == (512, 16) and values.dtype == np.float32
    assert (values > 0).all() and (np.diff(values, axis=1) <= 0).all()
    assert all(len(set(row)) == 16 for row in indices)
    counts = np.sort(np.bincount(indices.ravel(), minlength=2048))[::-1]
    assert counts[:20].sum() > 0.2 * counts.sum() > 20 * 20 / 2048 * counts.sum() * 0.1
    assert counts[1024:].sum() < 0.15 * counts.sum()  # half of all latents: uniform ones had half
    x = measure.zipf_rows(256, 32)
    assert np.mean(np.sum(x * x, axis=1)) == pytest.approx(1, rel=1e-4)


OUTPUTS = {  # of an op, what its forms have in common
    "decode": lambda out: out,
    "dots": lambda out: out,
    "scatter": lambda out: out,
    "backward": lambda out: out,
    "loss and gradients": lambda out: out,
    "AuxK": lambda out: out,
    "Adam, unit rows": lambda out: out[0],
    "top_k": lambda out: out[0],
    "encode": lambda out: out[0],
    "top_k + decode": lambda out: out,
}


@pytest.mark.parametrize("op", OUTPUTS)
def test_forms_of_an_op_do_the_same(script, op):
    """What ``ops_cpu.py`` divides by each other; selections hand on in forms of their own."""
    ops = script("ops_cpu")
    calls = ops.ops(*ops.SHAPES["tiny"])[op]()
    assert {"plain", "cpu"} <= set(calls)
    plain, *others = (jax.tree.leaves(OUTPUTS[op](call())) for call in calls.values())
    for other in others:
        assert len(plain) == len(other)
        for a, b in zip(plain, other):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_selections_keep_the_same_latents(script):
    ops = script("ops_cpu")
    b, d, n, k = 64, 32, 8192, 4
    calls = ops.ops(b, d, n, k)["batch selection"]()
    plain, ((values, _, exact), indices) = (calls[name]() for name in ("plain", "cpu"))
    assert bool(exact) and int((np.asarray(plain) > 0).sum()) == b * k
    dense = np.zeros((b, n), np.float32)
    np.put_along_axis(dense, np.asarray(indices), np.asarray(values), axis=1)
    np.testing.assert_allclose(dense, plain, rtol=1e-5)
    calls = ops.ops(16, d, 16384, k)["threshold selection"]()
    plain, (p, indices, active, exact) = (calls[name]() for name in ("plain", "cpu"))
    assert bool(exact)
    dense = np.zeros((16, 16384), np.float32)
    np.put_along_axis(dense, np.asarray(indices), np.where(active, p, 0), axis=1)
    np.testing.assert_allclose(dense, plain, rtol=1e-5, atol=1e-6)


def test_every_op_has_a_floor(script):
    ops = script("ops_cpu")
    b, d, n, k = ops.SHAPES["tiny"]
    floors = {op: ops.floor(op, b, d, n, k) for op in ops.ops(b, d, n, k)}
    assert min(floors.values()) > 0
    assert max(floors, key=floors.__getitem__) in ("train step", "threshold selection")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["harvest", "stream_quality", "store_peers"])
def test_runs(name, tmp_path):
    peers = ["--only"] if name == "store_peers" else []
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--tiny", *peers]
    command += [f"--dir={tmp_path / 'data'}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out.json").read_text())["machine"]
    assert (tmp_path / "out.md").read_text() in done.stdout
