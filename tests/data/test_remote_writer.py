"""Stores written to object stores; against servers of `saex[servers]` on loopback."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest

from saex import loop
from saex.data import Column, Store, StoreError, StoreWriter, merge_parts, store_remote
from saex.data.room import check_spool
from saex.data.store_copy import copy_store
from saex.data.store_remote import RemotePath
from saex.harvest import Harvest, harvest
from saex.models import load_model
from saex.registry import ConfigError
from tests import runs
from tests.data.servers import EVERY_SCHEME, needs

COLUMNS = {"x": Column((5,)), "n": Column((), "int32"), "label": Column((), "string")}
ROWS, STEP = 400, 100
RETRIES = {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"}


def rows_of(start, stop):
    n = np.arange(start, stop)
    return {"n": n, "x": np.sin(n[:, None] * np.arange(1, 6)), "label": [f"{i % 3} ü" for i in n]}


def open_writer(path, part=None, **how):
    return StoreWriter(path, COLUMNS, {"made": "here"}, chunk_rows=64, part=part, **how)


def write(path, stop=ROWS, first=0, part=None):
    """Goes on to row `stop`, from `first` in a new store."""
    with open_writer(path, part) as writer:
        for start in range(writer.cursor.get("next", first), stop, STEP):
            writer.append(rows_of(start, start + STEP))
            writer.commit({"next": start + STEP})
        if stop == ROWS:
            writer.finish()


def keys(url):
    return {key.split("/")[0] for key in RemotePath(url)._keys()}


def assert_whole(url, local, litter=()):
    """That the store at `url` is what a writer made on the disk, and nothing else is there."""
    store, expected = Store.open(url), Store.open(local)
    store.verify()
    assert store.complete and store.digest == expected.digest
    for name in COLUMNS:
        assert store.read(name).tobytes() == expected.read(name).tobytes()
    assert store.strings("label") == expected.strings("label")
    a, b = store.stats["x"], expected.stats["x"]
    assert (a.sum.tolist(), a.sum_sq.tolist(), a.count) == (b.sum.tolist(), b.sum_sq.tolist(), ROWS)
    listed = {segment.path for segment in store.manifest.segments}
    assert keys(url) == {"manifest.json", "writer.lock", *listed, *litter}
    assert not os.listdir(tempfile.gettempdir())


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts at a request are short."""
    monkeypatch.setattr(store_remote, "_RETRIES", RETRIES)


@EVERY_SCHEME
def test_what_is_written_there_is_what_is_written_here(bucket, tmp_path):
    write(tmp_path / "local")
    write(f"{bucket}/stores/one", stop=300)
    assert Store.open(f"{bucket}/stores/one").rows == 300
    write(f"{bucket}/stores/one")
    assert_whole(f"{bucket}/stores/one", tmp_path / "local")
    assert copy_store(f"{bucket}/stores/one", tmp_path / "copy").rows == ROWS
    with open_writer(f"{bucket}/stores/one") as writer:
        assert writer.complete and writer.rows == ROWS and not writer.missing
        with pytest.raises(StoreError, match="is complete"):
            writer.append(rows_of(0, 1))


@EVERY_SCHEME
def test_parts_are_written_there_and_merged(bucket, tmp_path):
    for path in (tmp_path / "local", f"{bucket}/one"):
        write(path, first=0, part=(0, 2)), write(path, first=300, part=(1, 2))
        assert merge_parts(path).digest == merge_parts(path).digest  # again, as after a kill
    assert Store.open(f"{bucket}/one").digest == Store.open(tmp_path / "local").digest
    assert Store.open(f"{bucket}/one").read("n").tolist() == [*range(400), *range(300, 400)]
    with pytest.raises(StoreError, match="nothing to merge"):
        merge_parts(f"{bucket}/nothing")


CHILD = """
    import sys
    from tests.data import test_remote_writer
    test_remote_writer.write(sys.argv[1])
"""


def killed_at(way, url, moment):
    """Runs a writer and kills it as soon as a request fulfils `moment`, before it is answered."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), url]
    root = pathlib.Path(__file__).parents[2]
    child = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})

    def kill(*request):
        if moment(*request):
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            way.down = lambda *request: False
        return False

    way.down = kill
    assert child.wait(120) == -signal.SIGKILL


@needs("s3")
@pytest.mark.parametrize("at", ["file", "manifest"])
def test_a_kill_at_any_moment_loses_what_was_not_committed_and_no_more(bucket, way, tmp_path, at):
    write(tmp_path / "local")
    url, commits = f"{bucket}/one", 0

    def moment(method, path):
        nonlocal commits
        commits += method == "PUT" and path.endswith("manifest.json")
        wanted = "manifest.json" if at == "manifest" else "segment-000002"
        return method == "PUT" and wanted in path and commits == (3 if at == "manifest" else 2)

    killed_at(way, url, moment)
    assert os.listdir(tempfile.gettempdir())  # what the killed one was about to send
    found = Store.open(url)
    found.verify()
    assert found.rows == (300 if at == "manifest" else 200)
    assert len(keys(url)) == found.rows / STEP + 2 + (at == "file")
    write(url)
    assert_whole(url, tmp_path / "local")


@needs("s3")
@pytest.mark.slow
def test_kills_at_twenty_moments(bucket, way, tmp_path):
    write(tmp_path / "local")
    for trial in range(20):
        left = 1 + trial * 2

        def moment(method, path):
            nonlocal left
            left -= 1
            return left == 0

        killed_at(way, f"{bucket}/{trial}", moment)
        write(f"{bucket}/{trial}")
        assert_whole(f"{bucket}/{trial}", tmp_path / "local")


@EVERY_SCHEME
def test_a_server_that_goes_away_is_an_error_and_the_commit_may_be_tried_again(
    bucket, way, tmp_path, quick
):
    write(tmp_path / "local")
    with open_writer(f"{bucket}/one") as writer:
        for start, moment in ((0, "stats.json"), (100, "manifest.json")):
            writer.append(rows_of(start, start + STEP))
            way.down = lambda method, path, moment=moment: moment in path
            with pytest.raises(StoreError, match=rf"not write 100 rows to {bucket}/one: .*503"):
                writer.commit({"next": start + STEP})
            assert writer.rows == start and writer.buffered == STEP
            assert os.listdir(writer._work) == ["writer.lock"]
            way.down = lambda method, path: False
            writer.commit({"next": start + STEP})
    write(f"{bucket}/one")
    assert_whole(f"{bucket}/one", tmp_path / "local")


@needs("s3")
def test_a_run_that_ended_for_want_of_a_server_goes_on_later(bucket, way, tmp_path, quick):
    write(tmp_path / "local")
    write(f"{bucket}/one", stop=200)
    way.down = lambda method, path: method == "PUT" and "segment-" in path
    with pytest.raises(StoreError, match="The 200 rows committed before are whole: see to the obj"):
        write(f"{bucket}/one")
    way.down = lambda method, path: True
    with pytest.raises(StoreError, match=rf"cannot write a store at {bucket}/one: .*503"):
        write(f"{bucket}/one")
    with pytest.raises(StoreError, match=rf"{bucket}/one cannot be read or written: .*503"):
        merge_parts(f"{bucket}/one")
    way.down = lambda method, path: False
    write(f"{bucket}/one")
    assert_whole(f"{bucket}/one", tmp_path / "local")


@needs("s3")
@pytest.mark.parametrize("again", ["at once", "by the writer", "by another"])
def test_a_manifest_that_was_written_though_the_answer_was_lost(
    bucket, way, tmp_path, quick, again
):
    write(tmp_path / "local")
    url = f"{bucket}/one"
    write(url, stop=200)
    way.mute = lambda method, path: method == "PUT" and "manifest.json" in path and lost()
    left = 1 if again == "at once" else 10**9

    def lost():
        nonlocal left
        left -= 1
        return left >= 0

    with open_writer(url) as writer:
        writer.append(rows_of(200, 300))
        if again == "at once":
            writer.commit({"next": 300})
        else:
            with pytest.raises(StoreError, match="could not write 100 rows"):
                writer.commit({"next": 300})
            assert Store.open(url).rows == 300 and writer.rows == 200
        way.mute = lambda method, path: False
        if again == "by the writer":
            writer.commit({"next": 300})
    write(url)
    assert_whole(url, tmp_path / "local")


@EVERY_SCHEME
def test_of_two_writers_one_is_refused_and_nothing_is_torn(bucket, tmp_path, monkeypatch):
    write(tmp_path / "local")
    url = f"{bucket}/one"
    with open_writer(url) as first:
        with pytest.raises(StoreError, match=rf"{url} is being written by process {os.getpid()}"):
            open_writer(url)
        (tmp_path / "spool/other").mkdir()  # as on another machine, where the lock is not seen
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool/other"))
        with open_writer(url) as second:
            for writer in (first, second):
                writer.append(rows_of(0, 100))
            second.commit({"next": 100})
            for _ in range(2):
                with pytest.raises(StoreError, match=r"manifest.json was written by another write"):
                    first.commit({"next": 100})
            second.append(rows_of(100, 200))
            second.commit({"next": 200})
        (tmp_path / "spool/other").rmdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    write(url)
    assert_whole(url, tmp_path / "local")


@needs("s3")
def test_segments_that_were_deleted_are_written_anew(bucket, tmp_path):
    write(tmp_path / "local")
    url = f"{bucket}/one"
    write(url)
    RemotePath(url).rmtree([Store.open(tmp_path / "local").manifest.segments[0].path])  # not there
    RemotePath(url).rmtree([Store.open(url).manifest.segments[1].path])
    with pytest.raises(StoreError, match="is missing"):
        Store.open(url)
    with open_writer(url) as writer:
        assert writer.missing == [1] and writer.span(1) == ({"next": 100}, {"next": 200})
        writer.append(rows_of(100, 200))
        writer.commit({"next": 200}, replace=1)
    assert_whole(url, tmp_path / "local")


@needs("s3")
def test_places_that_are_no_stores_are_refused_and_left_alone(bucket, tmp_path):
    write(f"{bucket}/stores/one", stop=100)
    with pytest.raises(StoreError, match=rf"{bucket}/stores is not empty and not a store"):
        open_writer(f"{bucket}/stores")
    assert keys(f"{bucket}/stores") == {"one"}
    with pytest.raises(StoreError, match="holds a store of another configuration"):
        StoreWriter(f"{bucket}/stores/one", COLUMNS, {"made": "there"})
    with pytest.raises(StoreError, match=r"cannot write a store at s3://no-bucket/one.*NoSuch"):
        open_writer("s3://no-bucket/one")
    with pytest.raises(StoreError, match=r"part=\(2, 2\)"):
        open_writer(f"{bucket}/one", (2, 2))


def test_workdirs_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--workdir=s3://b/run: a workdir is a folder on a disk"):
        loop.train(runs.config(tmp_path), "s3://b/run")
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_a_segment_where_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert f"0.000 GB at a time in {tmp_path}" in check_spool("s3://b/one", 1000)
    with pytest.raises(StoreError, match=r"segments of s3://b/one have no room .* Set TMPDIR"):
        check_spool("s3://b/one", 10**18)
    assert "GB free there" in check_spool("s3://b/one", 10**18, enforce=False)


@EVERY_SCHEME
def test_a_model_is_harvested_straight_there_and_a_run_trains_on_it(bucket, tmp_path):
    text = runs.write_text(tmp_path / "text") and runs.config(tmp_path).text
    model, params = load_model(runs.write_model(tmp_path / "model.safetensors"))
    cfg = Harvest(
        rows=3000, heldout_rows=600, batch=8, segment_rows=800, chunk_rows=64, parts=2,
        dtype="int8", calibration_rows=500,
    )  # fmt: skip
    results = []
    for root in (tmp_path / "store", f"{bucket}/rows"):
        for split in ("train", "heldout"):
            site = "blocks.0.resid_post"
            path = f"{root}/{split}"
            harvest(model, params, text, split, path, cfg, sites=[site])
            harvest(model, params, text, split, path, cfg, sites=[site])  # finds it done
        changes = {"store": str(root), "subject": None}
        config = runs.config(tmp_path, **changes)
        results.append(
            (Store.open(path).digest, loop.train(config, tmp_path / f"run{len(results)}"))
        )
    assert results[0] == results[1] and results[0][1]["fvu"] > 0
