"""Disk need: what is told is what the files take, and too little room is refused."""

import types

import numpy as np
import pytest

from saex.data import Column, StoreError, StoreWriter, calibrate, room
from saex.data.room import bytes_needed, check_room

SAMPLE = np.random.default_rng(0).standard_normal((100, 33)).astype(np.float32)
COLUMNS = {"x": Column((33,)), "q": calibrate(SAMPLE), "label": Column((), "string")}


def write(path, rows, **options):
    with StoreWriter(path, COLUMNS, chunk_rows=16, **options) as writer:
        for at in range(0, rows, 100):
            n = min(100, rows - at)
            writer.append({"x": SAMPLE[:n], "q": SAMPLE[:n], "label": ["a"] * n})
            writer.commit({"next": at + n})
        writer.finish()


def test_the_bytes_told_are_those_of_the_data_files(tmp_path):
    write(tmp_path, 730)
    files = [f for f in tmp_path.glob("segment-*/*/c/**/*") if f.is_file()]
    needed = bytes_needed(COLUMNS, 730, 100, 16)
    assert needed == sum(f.stat().st_size for f in files)
    assert "0.000 GB to write" in check_room(tmp_path, needed)


def test_what_does_not_fit_is_refused_and_what_is_there_counts(tmp_path, monkeypatch):
    write(tmp_path / "whole", 400)
    there = sum(f.stat().st_size for f in tmp_path.rglob("segment-*/**/*") if f.is_file())
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert check_room(tmp_path / "whole", there + 1000)
    for path, needed in ((tmp_path / "whole", there + 1001), (tmp_path / "a/b/new", 1001)):
        with pytest.raises(StoreError, match=r"has no room on its disk: .* GB free\. Make room"):
            check_room(path, needed)
        assert check_room(path, needed, enforce=False)
    with pytest.raises(StoreError, match="has no room"):
        StoreWriter(tmp_path / "new", COLUMNS, rows=100)
    assert not (tmp_path / "new").exists()
    write(tmp_path / "new", 100)  # nothing said, nothing refused
