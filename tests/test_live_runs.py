"""Whole runs on a live source: killed, gone on, on several processes, and what is refused."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from saex import loop, metrics
from saex.checkpoint import info
from saex.data import Store
from saex.registry import ConfigError
from tests import runs
from tests.live_cases import contents


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
