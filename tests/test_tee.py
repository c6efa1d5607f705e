"""The tee: what is made for a run is written, once, whatever stops it."""

import dataclasses
import re
import shutil

import pytest

from saex.data import Store, StoreError, StoreWriter, room
from tests import live_cases
from tests.live_cases import CFG, STREAM, TEE, contents, rows_of

stored, opened = live_cases.stored, live_cases.opened


def train_on(rows, stream, first, steps):
    """What a run does with a live source."""
    rows.plan(stream, steps)
    iterator = stream.iterate(first)
    for _ in range(first, steps):
        next(iterator)
    iterator.close()
    stream.close()


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


def test_what_the_tee_takes_is_told_before_the_first_row_and_refused_where_it_does_not_fit(
    tmp_path, opened, monkeypatch, caplog
):
    def plan(free, **changes):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        cfg = dataclasses.replace(CFG, **changes)
        rows = rows_of(tmp_path / "tee", cfg, live=TEE)
        stream = opened(rows)
        with monkeypatch.context() as patch:
            patch.setattr(room.shutil, "disk_usage", lambda path: usage)
            try:
                rows.plan(stream, 9)
            finally:
                rows.close()
        return rows, stream

    with pytest.raises(StoreError, match=r"live.tee=True would write \d+ rows: .* has no room"):
        plan(1000)
    assert not (tmp_path / "tee").exists()
    plan(1000, check_room=False)
    with caplog.at_level("INFO", "saex"):
        plan(10**9)
    rows = rows_of(tmp_path / "tee", live=TEE)
    stream = opened(rows)
    train_on(rows, stream, 0, 9)
    rows.finish()
    rows.close()
    store = Store.open(tmp_path / "tee")
    told = re.search(r"tee: ([\d,]+) rows, [\d.]+ GB in all", caplog.text)
    assert int(told[1].replace(",", "")) == store.rows


def test_what_other_processes_began_is_not_gone_on_with(tmp_path, opened):
    rows = rows_of(tmp_path / "tee", live=TEE)
    with rows._tee._open(part=(0, 2)) as writer:
        writer.commit({"chunks": []})
    with pytest.raises(StoreError, match="was begun by 2 processes, here are 1"):
        rows.plan(opened(rows), 3)
    rows.close()
