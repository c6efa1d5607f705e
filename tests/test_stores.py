"""Stores of a run, and those that a harvest of its own writes."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest

from saex import loop, metrics, stores
from saex.data import Store, StoreError, room
from saex.registry import ConfigError
from tests import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores")
    runs.write_text(path / "text")
    runs.write_model(path / "model.safetensors")
    (path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({runs.mapping(path)!r})\n"
    )
    return path


def saex(*args):
    done = subprocess.run(
        [sys.executable, "-m", "saex.cli", *map(str, args)], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def test_a_harvest_of_its_own_is_that_of_the_run_and_is_trained_on(folder):
    config, place = f"--config={folder}/config.py", folder / "rows"
    said = saex("harvest", config, f"--store={place}")
    assert f"train on them by --config.store={place}" in said
    saex("train", config, f"--workdir={folder}/run")
    for split in ("train", "heldout"):
        own, of_run = Store.open(place / split), Store.open(folder / "run" / "store" / split)
        assert own.digest == of_run.digest
        assert f"{own.rows:,} rows, columns blocks.0.resid_post" in said
    saex("train", config, f"--config.store={place}", f"--workdir={folder}/again")
    one, two = (json.loads((folder / w / "eval.json").read_text()) for w in ("run", "again"))
    assert one["fvu"] == two["fvu"]


def test_a_harvest_that_is_stopped_goes_on(folder, monkeypatch):
    config, place = runs.config(folder), folder / "stopped"

    def stop(self, done, note=""):
        if done > 2000:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Progress, "update", stop)
    with pytest.raises(loop.Preempted):
        loop.harvest(config, place)
    kept = Store.open(place / "train").manifest.segments
    assert kept
    monkeypatch.undo()
    train, heldout = loop.harvest(config, place)
    assert train.manifest.segments[: len(kept)] == kept
    assert train.complete and heldout.complete


@pytest.mark.parametrize("parts", [1, 3])
def test_progress_counts_the_rows_there_will_be_once(folder, monkeypatch, parts):
    made, seen = [], []

    class Told(metrics.Silent):
        def __init__(self, what, total, start=0, unit="step"):
            made.append((what, total, start))

        def update(self, done, note=""):
            seen.append(done)
            assert note.endswith("rows/s")

    monkeypatch.setattr(metrics, "Progress", Told)
    config = runs.config(folder, harvest__parts=parts)
    train, heldout = loop.harvest(config, folder / f"told{parts}")
    (first, rows, start), (second, held, _) = made  # one bar a split, whatever the parts
    assert (first, second) == ("harvest train", "harvest heldout")
    assert (rows, held) == (train.rows, heldout.rows) and 0 < start < rows
    assert seen[-1] == held and train.rows in seen
    assert seen[: seen.index(train.rows)] == sorted(seen[: seen.index(train.rows)])


def test_only_the_first_process_shows_progress(folder, monkeypatch):
    monkeypatch.setattr(stores.distributed, "is_main", lambda: False)
    monkeypatch.setattr(metrics, "Progress", None)
    given = stores.subject_of(runs.config(folder), "")
    store = stores._harvested(
        runs.config(folder), *given, "heldout", folder / "rows" / "heldout", lambda: None
    )
    assert store.complete


def test_room_for_one_of_both_stores_is_refused_before_either_is_begun(folder, monkeypatch):
    config = runs.config(folder)
    train, heldout = loop.harvest(config, folder / "fits")
    sizes = [
        sum(f.bytes for s in store.manifest.segments for n, f in s.files.items() if "/c/" in n)
        for store in (train, heldout)
    ]
    free = types.SimpleNamespace(free=sum(sizes) - 1)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: free)
    for make in (
        lambda: loop.harvest(config, folder / "full" / "store"),
        lambda: stores.of_run(config, folder / "full", None, lambda: None),
    ):
        with pytest.raises(StoreError, match=r"no room .* GB for the other store, .*heldout_rows"):
            make()
        assert not (folder / "full").exists()
    free.free += 1
    again, _ = loop.harvest(config, folder / "full")
    assert again.digest == train.digest
    free.free = 0  # both are there, nothing is left to write
    loop.harvest(config, folder / "full")


def test_a_harvest_without_a_model_names_the_mend(folder):
    with pytest.raises(ConfigError, match="saex harvest is for models"):
        loop.harvest(runs.config(folder, subject=None), folder / "none")
