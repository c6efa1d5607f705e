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
    for op, b, n in (("batch selection", 64, 8192), ("threshold selection", 16, 16384)):
        calls = ops.ops(b, 32, n, 4)[op]()
        plain, (codes, fits) = (calls[name]() for name in ("plain", "cpu"))
        assert fits and (op[0] == "t" or int((np.asarray(plain) > 0).sum()) == b * 4)
        dense = np.zeros((b + 1, n), np.float32)
        np.add.at(dense, (np.asarray(codes.rows)[:, None], codes.indices), codes.values)
        np.testing.assert_allclose(dense[:b], plain, rtol=1e-5, atol=1e-6)


def test_every_op_has_a_floor(script):
    ops = script("ops_cpu")
    b, d, n, k = ops.SHAPES["tiny"]
    floors = {op: ops.floor(op, b, d, n, k) for op in ops.ops(b, d, n, k)}
    assert min(floors.values()) > 0
    assert max(floors, key=floors.__getitem__) in ("train step", "threshold selection")


def test_encoders_side_by_side_multiply_the_same(script):
    stacks = script("stack_cpu")
    apart, beside = (
        call() for call in stacks.products(script("measure").zipf_rows(64, 8), 32).values()
    )
    np.testing.assert_allclose(np.concatenate(apart, axis=1), beside, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # three programs to compile
def test_layouts_of_a_stack_do_the_same(script, monkeypatch):
    stacks = script("stack_cpu")
    monkeypatch.setattr(stacks, "MEMBERS", 2)
    x = script("measure").zipf_rows(64, 8)
    mesh = stacks.make_mesh(stacks.MeshConfig())
    stream = SimpleNamespace(sample=lambda count: {"x": x})
    with jax.set_mesh(mesh):
        batch = {"x": jax.numpy.asarray(x)}
        made = [stacks.stacked(mesh, stream, 64, layout) for layout in stacks.OTHERS.values()]
        for step in (unrolled := stacks.stepper(mesh, stream, 64, 2), *made):
            step(batch)
        _, want = unrolled(batch)
        for step in made:
            _, metrics = step(batch)
            for m, one in enumerate(want):
                np.testing.assert_allclose(metrics["loss"][m], one["loss"], rtol=1e-5)
    assert want[0]["loss"] != want[1]["loss"]


# ---------------------------------------------------------------------------------------- for GPUs


def told(device, **found):
    return {"device": device, "versions": {"jax": "1"}, "found": found, "ended": ""}


def test_parts_are_merged_with_what_was_measured_on_the_same_device(script):
    gpu = script("gpu")
    record = gpu.merged({}, "steps", told("H", A={"XLA": 1.0}, B={"XLA": 2.0}))
    record = gpu.merged(record, "peers", told("H", A={"torch": 4.0}))
    record = gpu.merged(record, "steps", told("H", B={"XLA": 3.0}))
    assert record["steps"] == {"A": {"XLA": 1.0}, "B": {"XLA": 3.0}}
    assert record["peers"] == {"A": {"torch": 4.0}} and set(record["measured"]) == {
        "steps",
        "peers",
    }
    lines = gpu.table(record | {"hardware": "h200"})
    row = next(line for line in lines if "| torch |" in line)
    # rows a second, and times the floor of 0.59 ms: also where no step was measured beside it
    assert "| 1,024,000 | " in row and float(row.split("|")[-2]) == pytest.approx(
        4 / 0.59, rel=0.02
    )
    other = gpu.merged(record, "ops", told("another"))
    assert "steps" not in other and other["device"] == "another"
    crashed = gpu.merged(record, "ops", {"found": {}, "ended": "ended with code 1"})
    assert crashed["device"] == "H" and crashed["steps"] == record["steps"]


def test_peers_are_held_to_the_goals(script):
    """By saex's step as it is; AuxK and what is no step take no part, nor what failed."""
    gpu = script("gpu")
    steps = {"XLA": 2.0, "Hopper all": 1.0, "XLA, AuxK on, nothing dead": 0.1, "other": "Error"}
    peers = {"eai-sparsify": 5.0, "sae-lens": 5.0, "torch.topk alone, k 32": 9.0, "torch": "Error"}
    record = gpu.merged({}, "steps", told("H", A=steps))
    assert gpu._peers(record) == []
    lines = gpu.table(gpu.merged(record, "peers", told("H", A=peers)) | {"hardware": "h200"})
    start = next(i for i, line in enumerate(lines) if "peer / saex" in line)
    assert lines[start + 2 : start + 4] == [
        "| A | eai-sparsify | 2.50 | 5.00 | 2x | yes |",
        "| A | sae-lens | 2.50 | 5.00 | 3x | no |",
    ]
    assert not any("alone" in line or "Error" in line for line in lines[start:])


def test_every_op_of_a_gpu_has_a_floor_and_a_call(script):
    gpu, ops = script("gpu"), script("gpu_ops")
    assert gpu.DEAD == ops.DEAD
    machine, (b, d, n, k) = gpu.cost.hardware("h200"), gpu.TINY["tiny"]
    for op in ops.OPS:
        assert gpu.floor(op, b, d, n, k, machine) > 0
    calls = ops.batch(b, d, n, k)
    kept = [np.asarray(a) for a in (calls["sparse"]()[0].values, calls["dense"]())]
    assert (kept[0] > 0).sum() == (kept[1] > 0).sum() == b * k
    np.testing.assert_allclose(*(np.sort(a[a > 0]) for a in kept), rtol=1e-5)
    calls = ops.threshold(b, d, n, k)
    values, p = (np.asarray(a) for a in (calls["sparse"]()[0].values, calls["dense"]()))
    np.testing.assert_allclose(np.sort(values[values != 0]), np.sort(p[p != 0]), rtol=1e-5)


def test_an_error_ends_a_row_and_not_the_benchmark(script):
    clock = script("gpu_clock").Clock(2, 3, lambda out: out)

    def no_memory():
        raise MemoryError("RESOURCE_EXHAUSTED: 80 GB")

    assert clock.made(no_memory) == clock(no_memory) == "MemoryError: RESOURCE_EXHAUSTED: 80 GB"
    calls = iter(range(100))
    assert clock(lambda: next(calls)) >= 0
    assert next(calls) == 2 + 2 * 3  # two that compile, three in each of two rounds


def test_gathers_are_looked_for_in_their_own_computations(script):
    fused = "%f (p: f32[8]) -> f32[] {\n  %g = f32[8] gather(p)\n  ROOT %r = f32[] reduce(%g)\n}"
    alone = "ENTRY %m {\n  %g = f32[8] gather(p)\n}\n\n%s {\n  ROOT %r = f32[] reduce(p)\n}"
    gathers = script("gpu_questions").gathers
    assert gathers(fused) == (1, 0) and gathers(alone) == (0, 1)
    assert gathers(f"{fused}\n\n{alone}") == (1, 1)


def test_gradients_of_the_published_algorithm(script):
    """By hand against torch's autograd through dense codes."""
    torch = pytest.importorskip("torch")
    peer = script("gpu_peers_openai")
    torch.manual_seed(0)
    x, W = torch.randn(40, 32), torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    weights = [0.7 * W, W.clone(), 0.1 * torch.randn(64), 0.1 * torch.randn(32)]
    with torch.no_grad():
        found = peer.gradients(x, *weights, 4)
    W_enc, W_dec, b_enc, b_dec = (w.clone().requires_grad_() for w in weights)
    p = torch.nn.functional.linear(*(a.bfloat16() for a in (x - b_dec, W_enc, b_enc)))
    values, indices = p.topk(4, dim=1)
    codes = torch.zeros(40, 64).scatter(1, indices, values.relu().float())
    (x - codes @ W_dec - b_dec).square().mean().backward()
    flat = W_dec.grad - (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    for got, want in zip(found, (W_enc.grad, flat, b_enc.grad, b_dec.grad)):
        assert (got - want).abs().max() < 0.01 * want.abs().max()  # autograd's is in bfloat16


@pytest.mark.slow
def test_all_of_the_gpu_benchmark_works_without_one(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", f"--out={tmp_path / 'gpu'}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu_tiny.json").read_text())
    assert set(record["measured"]) == {"questions", "ops", "steps", "peers"}
    for part in ("questions", "ops", "steps"):
        assert not record["measured"][part]["ended"] and record[part]
    assert isinstance(record["steps"]["tiny"]["XLA"], float)
    assert all(isinstance(ms, float) for ms in record["ops"]["tiny"]["backward"].values())


CPU_SCRIPTS = {  # and what makes them small
    "ops_cpu": ["--tiny"],
    "ways_cpu": ["--tiny"],
    "step_cpu": ["--tiny", "--only", "saex", "--dtypes", "float32", "bfloat16"],
    "topk_cpu": ["--widths", "1024", "--ks", "8", "--rounds", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_SCRIPTS)
def test_cpu_tables_have_floors(name, tmp_path):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *CPU_SCRIPTS[name]]
    command += [f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = tmp_path.glob("*.md")
    assert "floor" in table.read_text() and "measured here and now" in table.read_text()


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
