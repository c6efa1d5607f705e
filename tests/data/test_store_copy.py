"""Copies of stores: whole or not there, whatever stops them or gets in their way."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.store_copy import copy_store
from saex.data.store_remote import RemotePath
from tests.data.servers import needs

COLUMNS = {"x": Column((5,), "float32"), "n": Column((), "int32")}


def write(path, segments=3):
    with StoreWriter(path, COLUMNS, {"made": "here"}, chunk_rows=16) as writer:
        for start in range(0, 100 * segments, 100):
            n = np.arange(start, start + 100)
            writer.append({"n": n, "x": np.sin(n[:, None] * np.arange(1, 6))})
            writer.commit({"next": start + 100})
        writer.finish()
    return Store.open(path)


KILLED = """
    import os, signal, sys
    from saex.data import store_copy
    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "before the manifest":
        os.replace = kill  # its text lies there, but not under its name
    else:
        write = store_copy._write
        at = lambda file: kill() if file.name == "stats.json" else None
        store_copy._write = lambda file, data: at(file) or write(file, data)
    store_copy.copy_store(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["before the manifest", "between the files"])
def test_a_copy_that_was_killed_is_no_store_and_is_begun_again(tmp_path, moment):
    local, to = write(tmp_path / "a"), tmp_path / "b"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(local.path), str(to), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert list(to.glob("segment-*")) and not (to / "manifest.json").exists()
    with pytest.raises(StoreError, match=r"has no manifest.json"):
        Store.open(to)
    copy = copy_store(local.path, to)
    copy.verify()
    manifests = [(store.path / "manifest.json").read_bytes() for store in (local, copy)]
    assert manifests[0] == manifests[1] and copy.digest == local.digest
    assert not list(to.glob("*.tmp"))


def test_a_copy_and_a_writer_do_not_meet_in_one_folder(tmp_path):
    local = write(tmp_path / "a")
    with StoreWriter(tmp_path / "b", COLUMNS):
        with pytest.raises(StoreError, match=r"b is being written by process \d+"):
            copy_store(local.path, tmp_path / "b")
    assert copy_store(local.path, tmp_path / "b").digest == local.digest
    with pytest.raises(StoreError, match="is a store already"):
        copy_store(local.path, tmp_path / "b")


def test_a_store_that_grows_meanwhile_is_not_copied_in_part(tmp_path, monkeypatch):
    """The copy's manifest would list a segment that was not copied."""
    columns = {"n": Column((), "int32")}
    with StoreWriter(tmp_path / "a", columns) as writer:
        writer.append({"n": [1, 2]})
        writer.commit({})
        opened = Store.open(tmp_path / "a")
        writer.append({"n": [3]})
        writer.commit({})
    with monkeypatch.context() as patch:
        patch.setattr(Store, "open", lambda path: opened)
        with pytest.raises(StoreError, match=r"a is being written: copy it when"):
            copy_store(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()
    assert copy_store(tmp_path / "a", tmp_path / "b").read("n").tolist() == [1, 2, 3]


@needs("s3")
def test_nothing_is_copied_over_a_manifest_that_came_meanwhile(bucket, way, tmp_path):
    local, other = write(tmp_path / "a"), write(tmp_path / "other", segments=1)
    theirs = (other.path / "manifest.json").read_bytes()
    manifest = RemotePath(f"{bucket}/one/manifest.json")
    asked = []

    def meanwhile(method, path):
        if (method, path.endswith("manifest.json")) == ("PUT", True) and not asked:
            asked.append(path)
            manifest.write_bytes(theirs)
        return False

    way.down = meanwhile
    with pytest.raises(StoreError, match=r"manifest.json was written by somebody else"):
        copy_store(local.path, f"{bucket}/one")
    assert asked and manifest.read_bytes() == theirs


@needs("s3")
def test_a_copy_whose_last_answer_is_lost_is_a_copy(bucket, way, tmp_path):
    local, lost = write(tmp_path / "a"), []

    def mute(method, path):
        if method == "PUT" and path.endswith("manifest.json") and not lost:
            lost.append(path)
            return True
        return False

    way.mute = mute
    assert copy_store(local.path, f"{bucket}/one").digest == local.digest and lost
