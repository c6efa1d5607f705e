"""What happens to a store: torn, altered, of another version, killed, out of space."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import saex.data.store_shards as shards
import saex.data.store_writer as store_writer
from saex.data import Column, Store, StoreError, StoreWriter, calibrate
from saex.data.manifest import json_sha256
from saex.data.store_shards import crc32c
from tests.data.test_store_format import crc32c_bitwise

COLUMNS = {"x": Column((5,), "float32"), "tokens": Column((), "int32")}


def make_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5), np.float32)
    return {"x": x, "tokens": rng.integers(0, 9, n, np.int32)}


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "store", COLUMNS, chunk_rows=8) as writer:
        for i, n in enumerate((20, 13, 16)):
            writer.append(make_rows(n, seed=n))
            writer.commit({"next": i + 1})
        writer.finish()
    return Store.open(tmp_path / "store")


def file_of(store, name, segment=1):
    return store.path / store.manifest.segments[segment].path / name


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def refused(call, *args):
    with pytest.raises(StoreError) as error:
        call(*args)
    return str(error.value)


FILES = ["x/c/0/0", "x/zarr.json", "tokens/c/0", "tokens/zarr.json", "stats.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_gone_is_refused_by_name_at_open(store, name):
    file = file_of(store, name)
    data = file.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 0):
        file.write_bytes(data[:size])
        message = refused(Store.open, store.path)
        assert str(file) in message and f"has {size} bytes; {len(data)} were written" in message
    file.write_bytes(data + b"x")
    assert str(file) in refused(Store.open, store.path)
    file.unlink()
    message = refused(Store.open, store.path)
    assert f"{file}: is missing; hurt: rows 20 to 32" in message
    assert "delete these folders and run the same harvest again" in message
    assert str(file_of(store, "").parent / store.manifest.segments[1].path) in message
    file.write_bytes(data)
    Store.open(store.path).verify()


def test_a_flipped_byte_in_a_shard_is_found_with_its_rows(store):
    """Each chunk holds 8 rows of 20 bytes and 4 of CRC; segment 1 holds rows 20 to 32."""
    file = file_of(store, "x/c/0/0")
    for at, rows in ((0, "20 to 27"), (163, "20 to 27"), (164, "28 to 32"), (327, "28 to 32")):
        flip(file, at)
        again = Store.open(store.path)  # sizes and index are as they were
        message = refused(again.verify)
        assert f"{file}: does not match its checksum (altered); hurt: rows {rows}" in message
        start, stop = (int(n) for n in rows.split(" to "))
        read = refused(again.read, "x", start, stop + 1, True)
        assert str(file) in read and "run the same harvest again" in read
        assert (again.read("tokens") == store.read("tokens")).all()
        flip(file, at)
    store.verify()


def test_every_flipped_byte_of_every_file_is_found(store):
    rng = np.random.default_rng(0)
    for name in FILES:
        file = file_of(store, name, segment=0)
        for at in rng.choice(file.stat().st_size, 12, replace=False):
            flip(file, at)
            try:
                damages = Store.open(store.path).damages()
                assert [d.file for d in damages] == [file]
            except StoreError as err:  # the index and small files: already when it is opened
                assert str(file) in str(err)
            flip(file, at)
    store.verify()


def test_flipped_bytes_are_found_in_every_kind_of_column(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 6)).astype(np.float32)
    columns = {"x": calibrate(x, 0.0, max_outliers=1), "label": Column((), "string")}
    with StoreWriter(tmp_path, columns, chunk_rows=16) as writer:
        writer.append({"x": x, "label": ["ünï", "b", "c"] * 20})
        writer.finish()
    store = Store.open(tmp_path)
    files = sorted(store.manifest.segments[0].files)
    assert len(files) == 8 and {"x.outliers/c/0/0", "label/strings.json"} <= set(files)
    for name in files:
        file = file_of(store, name, segment=0)
        for at in rng.choice(file.stat().st_size, 6, replace=False):
            flip(file, at)
            try:
                damages = Store.open(tmp_path).damages()
                assert [d.file for d in damages] == [file]
                size = store.columns[name.split("/")[0]].row_bytes
                chunk = at // (16 * size + 4)  # of which the last four bytes are its CRC
                assert damages[0].rows == ((16 * chunk, min(16 * chunk + 16, 60)),)
            except StoreError as err:
                assert str(file) in str(err)
            flip(file, at)
    store.verify()


def test_a_broken_index_is_refused_at_open(store):
    file = file_of(store, "tokens/c/0")
    for at in (-1, -4, -5, -20):
        flip(file, at)
        assert "the checksum of its index" in refused(Store.open, store.path)
        flip(file, at)
    data = file.read_bytes()
    index = np.frombuffer(data[-36:-4], "<u8").copy()
    index[2] = 10**9  # a valid checksum over an index that points outside of the file
    raw = index.tobytes()
    file.write_bytes(data[:-36] + raw + crc32c(raw).to_bytes(4, "little"))
    assert "its index misplaces chunk 1" in refused(Store.open, store.path)


def test_crc32c_is_the_standard_one():
    assert crc32c(b"123456789") == 0xE3069283
    rng = np.random.default_rng(0)
    for size in (0, 1, 16, 512, 2047, 2048, 2049, 4096, 31_256):  # in pieces from 2048 on
        data = rng.bytes(size)
        assert crc32c(data) == crc32c_bitwise(data)


def test_a_file_that_goes_while_the_store_is_open_is_not_read_as_zeros(store):
    store.read("x", 0, 1)
    file = file_of(store, "x/c/0/0")
    file.unlink()
    assert str(file) in refused(lambda: store.read("x"))
    assert store.read("x", 0, 20).any()


def edit_manifest(store, keep_checksum=False, **changes):
    file = store.path / "manifest.json"
    body = json.loads(file.read_text())
    body.update(changes)
    if not keep_checksum:
        rest = {k: v for k, v in body.items() if k != "checksum"}
        body["checksum"] = json_sha256(rest)
    file.write_text(json.dumps(body))
    return file


def test_manifest_of_a_newer_version_asks_for_an_upgrade(store):
    file = edit_manifest(store, version=3, segments="not as version 1 has them")
    message = refused(Store.open, store.path)
    assert str(file) in message and "version 3" in message and "upgrade saex" in message
    assert "upgrade saex" in refused(lambda: StoreWriter(store.path, COLUMNS, chunk_rows=8))
    assert len(list(store.path.glob("segment-*"))) == 3


def segment(store, **changes):
    body = json.loads((store.path / "manifest.json").read_text())
    body["segments"][0].update(changes)
    return {"segments": body["segments"]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (lambda s: {"format": "zarr"}, '"format" must be "saex-store"'),
        (lambda s: {"version": 0}, "version is 0"),
        (lambda s: {"version": "1"}, "version is '1'"),
        (lambda s: {"chunk_rows": 0}, "chunk_rows is 0"),
        (lambda s: {"columns": {"x": {"shape": [10**12], "dtype": "float32"}}}, "shape"),
        (lambda s: {"columns": {"x": {"shape": [5], "dtype": "O"}}}, "dtype is 'O'"),
        (lambda s: {"columns": {"../x": {"shape": [5], "dtype": "int8"}}}, "column name"),
        (lambda s: {"rows": 10**15}, "rows is 1000000000000000, not 49"),
        (lambda s: {"complete": 1}, "complete is 1; expected bool"),
        (lambda s: {"stats": {"x": {"count": -1}}}, "stats are not readable"),
        (lambda s: {"stats": {"x": 3}}, "stats are not readable"),
        (lambda s: {"segments": [3]}, "segments[0]: path"),
        (lambda s: segment(s, rows=10**12), "segments[0]"),
        (lambda s: segment(s, rows=True), "segments[0]: rows"),
        (lambda s: segment(s, path="/etc"), "segments[0]: path is '/etc'"),
        (lambda s: segment(s, path="segment-/../../x"), "expected a folder name"),
        (lambda s: segment(s, files={"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "are"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_by_field(store, changes, named):
    file = edit_manifest(store, **changes(store))
    message = refused(Store.open, store.path)
    assert str(file) in message and named in message


def test_an_altered_or_torn_manifest_is_refused(store):
    file = edit_manifest(store, keep_checksum=True, meta={"other": 1})
    assert "does not match its own checksum" in refused(Store.open, store.path)
    file.write_text(file.read_text()[:-50])
    assert "is not JSON" in refused(Store.open, store.path)
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(Store.open, store.path)
    file.unlink()
    assert "has no manifest.json" in refused(Store.open, store.path)
    assert "does not exist" in refused(Store.open, store.path / "nothing")


def test_a_lost_segment_is_written_anew_in_place(store):
    digest, x = store.digest, store.read("x")
    for file in sorted(file_of(store, "").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    file_of(store, "").rmdir()
    with StoreWriter(store.path, COLUMNS, chunk_rows=8) as writer:
        assert writer.missing == [1] and writer.complete
        assert writer.span(1) == ({"next": 1}, {"next": 2})
        writer.append(make_rows(12))
        with pytest.raises(StoreError, match="12 rows cannot replace segment 1 of 13 rows"):
            writer.commit({"next": 2}, replace=1)
    with StoreWriter(store.path, COLUMNS, chunk_rows=8) as writer:
        writer.append(make_rows(13, seed=13))
        writer.commit({"next": 2}, replace=1)
        assert writer.missing == []
    mended = Store.open(store.path)
    mended.verify()
    assert mended.digest == digest and (mended.read("x") == x).all()


def test_a_failing_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with StoreWriter(tmp_path, COLUMNS, chunk_rows=8) as writer:
        writer.append(make_rows(20))
        writer.commit({"next": 1})
        writer.append(make_rows(9, seed=9))
        for name in ("write_synced", "replace_synced", "sync_folders"):
            with monkeypatch.context() as patch:
                patch.setattr(store_writer, name, full)
                message = refused(lambda: writer.commit({"next": 2}))
            assert "No space left on device" in message and "20 rows committed before" in message
            assert len(list(tmp_path.glob("segment-*"))) == 1
            assert Store.open(tmp_path).rows == 20
        writer.commit({"next": 2})  # room was made: the rows are still there
        writer.finish()
    assert (Store.open(tmp_path).read("x", 20) == make_rows(9, seed=9)["x"]).all()


LIMITED = """
    import resource, sys, numpy as np
    from saex.data import Column, Store, StoreError, StoreWriter, calibrate
    path = sys.argv[1]
    with StoreWriter(path, {"x": Column((64,), "float32")}) as writer:
        writer.append({"x": np.ones((100, 64))})
        writer.commit({"next": 100})
        if sys.argv[2] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        writer.append({"x": np.ones((5000, 64))})
        try:
            writer.commit({"next": 5100})
        except StoreError as err:
            print(err)
    print("rows", Store.open(path).rows)
"""


def child(code, *args, **kwargs):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


def check_full(path, mode):
    out = child(LIMITED, path, mode).communicate(timeout=60)[0]
    assert "could not write 5000 rows" in out and "make room and run again" in out
    assert out.endswith("rows 100\n")
    assert len(list(path.glob("segment-*"))) == 1


def test_file_size_limit_while_writing(tmp_path):
    check_full(tmp_path, "limit")


def test_full_file_system(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system can be mounted by root only")
    try:
        check_full(small / "store", "fill")
    finally:
        subprocess.run(["umount", str(small)], check=True)


KILLED = """
    import sys, numpy as np
    from saex.data import Column, StoreWriter
    with StoreWriter(sys.argv[1], {"x": Column((32,)), "n": Column((), "int32")}) as writer:
        start = writer.cursor.get("next", 0)
        assert start == writer.rows, (start, writer.rows)
        print(start, flush=True)
        for at in range(start, 40_000, 500):
            n = np.arange(at, at + 500)
            writer.append({"n": n, "x": np.sin(n[:, None] * np.arange(1, 33))})
            writer.commit({"next": at + 500})
            print(at + 500, flush=True)
        writer.finish()
"""


def kill_loop(path, kills, rng):
    """Starts the writer and kills it some commits later, `kills` times; then lets it finish.

    Returns where each attempt began, the last commit that the one before had told of, and how
    many kills hit a write: left a folder that is no segment yet.
    """
    starts, told, hit = [], [0], 0
    for _ in range(kills):
        process = child(KILLED, path)
        starts.append(int(process.stdout.readline()))
        for _ in range(rng.integers(1, 80 // kills)):
            before = time.monotonic()
            last = int(process.stdout.readline())
            took = time.monotonic() - before
        time.sleep(rng.uniform(0, min(took, 0.01)))  # into the next commit, on any disk
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        told.append(last)
        store = Store.open(path)
        store.verify()
        on_disk = {p.name for p in path.glob("segment-*")}
        hit += bool(on_disk - {s.path for s in store.manifest.segments})
    process = child(KILLED, path)
    starts.append(int(process.communicate(timeout=120)[0].split()[0]))
    assert process.returncode == 0
    return starts, told, hit


def check_killed(path, kills, seed):
    starts, told, hit = kill_loop(path, kills, np.random.default_rng(seed))
    assert hit >= kills // 4, f"{hit} of {kills} kills hit a write: nothing is shown"
    assert all(start >= last for start, last in zip(starts, told)), "lost what was committed"
    assert 0 < starts[-1] < 40_000, "the kills came too late to show anything"
    store = Store.open(path)
    store.verify()
    n = np.arange(40_000)
    assert store.complete and (store.read("n") == n).all()
    x = np.sin(n[:, None] * np.arange(1, 33))
    assert (store.read("x") == x.astype(store.read("x", 0, 1).dtype)).all()
    on_disk = {p.name for p in path.glob("segment-*")}
    assert on_disk == {s.path for s in store.manifest.segments}


def test_kill_9_while_writing(tmp_path):
    check_killed(tmp_path / "store", kills=3, seed=0)


@pytest.mark.slow
def test_kill_9_at_20_random_moments(tmp_path):
    check_killed(tmp_path / "store", kills=20, seed=1)


def test_a_reader_writes_nothing(store):
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    store.read("x")
    store.verify()
    assert before == {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}


def test_a_failed_write_leaves_nothing_under_way(tmp_path):
    """One array fails at once while a large one is being written: its folder stays gone."""
    small, large = Column((), "int32"), Column((256,), "float32")
    folder = tmp_path / "segment"
    opened = {
        "a": shards.open_array(folder / "a", small, 8, 8, create=True),
        "b": shards.open_array(folder / "b", large, 40_000, 8, create=True),
    }
    (folder / "a" / "c" / "0").mkdir(parents=True)  # where its file should be
    rows = {"a": np.zeros(8, np.int32), "b": np.ones((40_000, 256), np.float32)}
    with pytest.raises(ValueError):
        shards.write_arrays([(opened[n], rows[n]) for n in opened])
    shutil.rmtree(folder)
    time.sleep(0.5)
    assert not folder.exists()
