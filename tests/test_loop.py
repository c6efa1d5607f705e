"""Runs end to end: finished, stopped, killed, extended, refused."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import saex
from saex import cli, loop, metrics
from saex.checkpoint import info
from saex.data import Column, StoreWriter
from saex.registry import ConfigError
from tests import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs.write_text(folder / "text")
    runs.write_model(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def unbroken(folder):
    """A run that nobody stopped; its store serves the others."""
    loop.train(runs.config(folder, eval__every=4), folder / "unbroken")
    return folder / "unbroken"


def with_store(folder, unbroken, **changes):
    return runs.config(folder, store=str(unbroken / "store"), **changes)


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read(workdir) if "loss" in line}


def untimed(workdir):
    timings = {"step_seconds", "wait_share"}
    return [{k: v for k, v in m.items() if k not in timings} for m in metrics.read(workdir)]


def test_a_run_leaves_what_it_promises(unbroken):
    result = json.loads((unbroken / "eval.json").read_text())
    needed = "fvu l0 mse cosine dead_fraction dense_fraction ce_clean ce_reconstructed"
    needed += " ce_mean_ablated ce_zero_ablated loss_recovered loss_recovered_mean"
    needed += " fvu_without_first kl tokens"
    assert set(needed.split()) <= set(result)
    ratios = {"loss_recovered", "loss_recovered_mean"}  # null where an ablation costs nothing
    assert all(np.isfinite(result[key]) for key in set(result) - ratios)
    assert json.loads((unbroken / "DONE.json").read_text())["steps"] == 12
    assert list(losses(unbroken)) == list(range(1, 13))
    streamed = [{k for k in m if k.startswith("stream/")} for m in metrics.read(unbroken)]
    assert not any(streamed[1:]) and {
        "stream/rows_kept", "stream/rows_excluded_by_position", "stream/documents_per_batch",
        "stream/documents_per_random_batch",
    } <= streamed[0]  # fmt: skip
    looked = [m["step"] for m in metrics.read(unbroken) if "heldout/fvu" in m]
    assert looked == [4, 8, 12] and result["step"] == 12
    sae, params = saex.load_sae(unbroken)
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    assert sae.decode(params, sae.encode(params, x)).shape == (5, 16)


def test_a_finished_run_says_so_and_does_nothing(folder, unbroken, caplog):
    before = (unbroken / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO", "saex"):
        loop.train(runs.config(folder), unbroken)
    assert "nothing to do" in caplog.text
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def same_run(one, other):
    a, b = info(one), info(other)
    assert a["state_digest"] == b["state_digest"] and a["params_digest"] == b["params_digest"]
    assert a["step"] == b["step"] and untimed(one) == untimed(other)


def test_sigterm_saves_and_the_resumed_run_is_the_unbroken_one(folder, unbroken, monkeypatch):
    workdir, config = folder / "stopped", with_store(folder, unbroken, eval__every=4)
    update = metrics.Progress.update

    def stop_at_seven(self, done, note=""):
        if self.what == "train" and done == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, done, note)

    monkeypatch.setattr(metrics.Progress, "update", stop_at_seven)
    with pytest.raises(loop.Preempted, match=r"saved step [89] of 12"):
        loop.train(config, workdir)
    assert not (workdir / "DONE.json").exists()
    monkeypatch.undo()
    loop.train(config, workdir)
    same_run(workdir, unbroken)


def test_sigterm_while_harvesting_keeps_what_was_committed(folder, monkeypatch):
    workdir, config = folder / "harvesting", runs.config(folder)

    def stop_early(self, done, note=""):
        if done > 2000:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Progress, "update", stop_early)
    with pytest.raises(loop.Preempted):
        loop.train(config, workdir)
    manifest = json.loads((workdir / "store" / "train" / "manifest.json").read_text())
    assert manifest["segments"]


def command(*args):
    return [sys.executable, "-m", "saex.cli", *map(str, args)]


def write_config(folder, name, **changes):
    path = folder / f"{name}.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({runs.mapping(folder, **changes)!r})\n"
    )
    return path


def test_kill_9_in_the_middle_and_the_resumed_run_is_the_unbroken_one(folder, unbroken):
    changes = {"store": str(unbroken / "store"), "checkpoint__every": 2, "steps": 12}
    path = write_config(folder, "killed", **changes)
    workdir, reference = folder / "killed", folder / "not_killed"
    run = command("train", f"--config={path}", f"--workdir={workdir}")
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(run, **quiet) as process:
        deadline = time.time() + 240
        while not list((workdir / "checkpoints").glob("[2-9]/meta")) and time.time() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (workdir / "DONE.json").exists()
    subprocess.run(run, check=True, timeout=300, **quiet)
    # The reference has as many CPU devices as the killed run: the same program, the same bits.
    other = command("train", f"--config={path}", f"--workdir={reference}")
    subprocess.run(other, check=True, timeout=300, **quiet)
    same_run(workdir, reference)


def test_a_field_that_came_later_is_no_other_configuration(folder, unbroken, tmp_path):
    old = json.loads((unbroken / "config.json").read_text())
    del old["config"]["live"], old["identity"]["live"]
    workdir = shutil.copytree(unbroken, tmp_path / "old")
    (workdir / "config.json").write_text(json.dumps(old))
    assert loop.train(runs.config(folder), workdir) == loop.train(runs.config(folder), unbroken)


def test_another_configuration_is_refused_and_named(folder, unbroken):
    with pytest.raises(ConfigError, match=r"another configuration(.|\n)*sae\.k: 4 -> 5"):
        loop.train(runs.config(folder, sae__k=5), unbroken)
    with pytest.raises(ConfigError, match=r"--extend continues with a larger budget"):
        loop.train(runs.config(folder, steps=13), unbroken)
    # where and how a run goes is not its identity
    loop.train(runs.config(folder, log__every=3, checkpoint__keep=5), unbroken)


def test_extend_goes_on(folder, unbroken):
    workdir = folder / "extended"
    loop.train(with_store(folder, unbroken), workdir)
    loop.train(with_store(folder, unbroken, steps=14), workdir, extend=True)
    assert info(workdir)["step"] == 14
    with pytest.raises(ConfigError, match="steps"):
        loop.train(with_store(folder, unbroken, steps=13), workdir, extend=True)


def test_not_finite_stops_with_the_last_good_step_named(folder, unbroken, monkeypatch):
    workdir, make = folder / "nan", loop.stack.make_stack_step

    def poisoned(*args):
        step_fn = make(*args)

        def run(slots, *rest):
            slots, (out,) = step_fn(slots, *rest)
            return slots, ({**out, "finite": out["finite"] & (slots[0].step != 7)},)

        return run

    monkeypatch.setattr(loop.stack, "make_stack_step", poisoned)
    with pytest.raises(loop.NotFinite, match=r"at step 7; the last good checkpoint is of step 6"):
        loop.train(with_store(folder, unbroken, checkpoint__every=1), workdir)
    assert info(workdir)["step"] == 6 and not (workdir / "DONE.json").exists()


def test_a_rate_that_explodes_is_not_finite_and_nothing_is_saved(folder, unbroken):
    config = with_store(folder, unbroken, optim__lr=1e38, checkpoint__every=1)
    with pytest.raises(loop.NotFinite, match="at step 1; no checkpoint yet"):
        loop.train(config, folder / "explodes")
    assert not list((folder / "explodes" / "checkpoints").glob("[0-9]*"))


def test_a_refused_run_leaves_the_workdir_to_the_corrected_one(folder, unbroken, tmp_path):
    with pytest.raises(ConfigError, match="has width 16"):
        loop.train(with_store(folder, unbroken, sae__d_in=8), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    loop.train(with_store(folder, unbroken), tmp_path / "run")


def test_another_store_or_order_is_not_resumed_on(folder, unbroken, tmp_path, monkeypatch):
    loop.train(with_store(folder, unbroken), tmp_path / "run")
    other = runs.config(folder, seed=1, harvest__rows=2000)
    loop.train(other, tmp_path / "other")
    changed = runs.config(folder, store=str(tmp_path / "other" / "store"), steps=14)
    with pytest.raises(ConfigError, match="trained on another store"):
        loop.train(changed, tmp_path / "run", extend=True)
    monkeypatch.setattr("saex.data.order.VERSION", 99)
    with pytest.raises(ConfigError, match="trained on rows in another order"):
        loop.train(with_store(folder, unbroken, steps=14), tmp_path / "run", extend=True)


def test_a_lost_evaluation_is_made_again(folder, unbroken, tmp_path):
    loop.train(with_store(folder, unbroken), tmp_path / "run")
    first = json.loads((tmp_path / "run" / "eval.json").read_text())
    (tmp_path / "run" / "eval.json").unlink()
    assert loop.train(with_store(folder, unbroken), tmp_path / "run")["fvu"] == first["fvu"]
    assert (tmp_path / "run" / "DONE.json").exists()


def test_meshes_give_the_same_losses(folder, unbroken):
    expected = list(losses(unbroken).values())
    for data, model in ((8, 1), (2, 4)):  # more of them in tests/sae/test_all.py
        workdir = folder / f"mesh{data}{model}"
        config = with_store(folder, unbroken, mesh__data=data, mesh__model=model)
        loop.train(config, workdir)
        np.testing.assert_allclose(list(losses(workdir).values()), expected, rtol=1e-5)


def test_an_unwritable_workdir_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir=.*file/run cannot be written to"):
        loop.train(runs.config(folder), tmp_path / "file" / "run")


def test_a_missing_store_is_named(folder, tmp_path):
    with pytest.raises(Exception, match=str(tmp_path / "nowhere")):
        loop.train(runs.config(folder, store=str(tmp_path / "nowhere")), tmp_path / "run")


def test_a_store_of_another_width_is_refused(folder, unbroken, tmp_path):
    config = with_store(folder, unbroken, sae__d_in=8)
    with pytest.raises(ConfigError, match=r"sae\.d_in=8, but blocks\.0\.resid_post has width 16"):
        loop.train(config, tmp_path / "run")


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.sae.kk=3", "no field 'kk' (did you mean 'k'?)"),
        ("--config.saee.k=3", "no section 'saee' (did you mean 'sae'?)"),
        ("--config.sae.k=many", "config.sae.k='many' is a str, expected int"),
        ("--config.steps=1e3", "config.steps=1000.0 is a float, expected int; write 1000"),
        ("--config.steps=None", "steps=None, tokens=None: set exactly one"),
        ("--config.tokens=500", "set exactly one"),
        ("--config.sae.k=65", "k=65 active of n=64 latents"),
        ("--config.sae.name=relu", "chosen by the config's argument"),
        ("--config.mesh.data=3", "stream.batch=64 is not divisible by mesh.data=3"),
        ("--config.mesh.model=3", "does not divide"),
        ("--config.optim.lr=-1", "lr=-1.0: a positive rate"),
        ("--config.sae=3", "override its fields one by one"),
        ("--config.subject.path=/nowhere", "no weights at '/nowhere'"),
        ("--config.site=blocks.9.resid_post", "config.site='blocks.9.resid_post': choose from"),
        ("--config.harvest.context=64", "harvest.context=64: the model was made for at most 32"),
        ("--config.text.path=/nowhere", "/nowhere"),
    ],
)
def test_bad_input_is_said_in_one_message(folder, tmp_path, capsys, override, message):
    path = write_config(folder, "good")
    argv = ["train", f"--config={path}", f"--workdir={tmp_path / 'run'}", override]
    assert cli.main(argv) == cli.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_overrides_reach_the_plan_and_a_dry_run_touches_nothing(folder, tmp_path, capsys):
    path = write_config(folder, "dry", store=str(tmp_path / "nowhere"))
    argv = ["train", f"--config={path}", "--dry_run", "--config.sae.k=8", "--config.seed", "5"]
    assert cli.main([*argv, "--config.mesh.model=2"]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out[: out.rindex("\n}") + 2])
    assert plan["sae"]["k"] == 8 and plan["seed"] == 5 and plan["mesh"]["model"] == 2
    assert "parameters      2,129" in out and "a device holds" in out
    assert saex.resolve(plan).sae.k == 8


def test_info_is_json_that_two_runs_can_be_compared_by(unbroken, capsys):
    assert cli.main(["info", str(unbroken), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 12
    assert {"config_hash", "params_digest", "state_digest"} <= set(found)


def test_eval_and_report_of_a_run(unbroken, capsys):
    assert cli.main(["eval", str(unbroken)]) == 0
    assert "FVU" in capsys.readouterr().out
    assert cli.main(["report", str(unbroken)]) == 0
    page = pathlib.Path(capsys.readouterr().out.strip())
    assert page.read_text().lower().startswith("<!doctype html>")


def test_rows_that_are_no_text_train_from_one_store(folder, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3)) @ rng.normal(size=(3, 16))
    with StoreWriter(tmp_path / "cells", {"cells": Column((16,), "float32")}) as writer:
        writer.append({"cells": x.astype(np.float32)})
        writer.commit({})
        writer.finish()
    changes = {"site": "cells", "subject": None, "eval__controls": True, "report__enabled": True}
    config = runs.config(folder, store=str(tmp_path / "cells"), **changes)
    result = loop.train(config, tmp_path / "run")
    assert 0.09 < result["rows"] / 2000 < 0.15 and np.isfinite(result["fvu"])
    assert "ce_clean" not in result and "pca.fvu" in result
    page = (tmp_path / "run" / "report.html").read_text()
    assert "cells" in page and "<svg" in page
    with pytest.raises(ConfigError, match="nothing to harvest"):
        loop.train(runs.config(folder, subject=None), tmp_path / "none")
