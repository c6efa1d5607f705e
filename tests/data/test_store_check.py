"""What a check of a store reads, and what it says of files that are whole but not the store's."""

import threading
import time

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.store_copy import copy_store
from tests.data.servers import needs

COLUMNS = {"x": Column((5,)), "n": Column((), "int32")}


def write(path, segments=2, shift=0.0):
    with StoreWriter(path, COLUMNS, chunk_rows=8) as writer:
        for start in range(0, 20 * segments, 20):
            n = np.arange(start, start + 20)
            writer.append({"n": n, "x": np.sin(n[:, None] * np.arange(1, 6)) + shift})
            writer.commit({"next": start + 20})
        writer.finish()
    return Store.open(path)


def test_a_file_that_is_whole_but_another_one_hurts_all_rows_of_its_segment(tmp_path):
    """Every chunk of it has the right CRC, so no chunk tells."""
    store, other = write(tmp_path / "a"), write(tmp_path / "b", shift=1.0)
    file, swapped = (s.folder(1) / "x/c/0/0" for s in (store, other))
    file.write_bytes(swapped.read_bytes())
    again = Store.open(store.path)
    (damage,) = again.damages()
    assert damage.file == file and damage.rows == ((20, 40),)
    with pytest.raises(StoreError, match=r"does not match its checksum \(altered\); hurt: rows 20"):
        again.verify()
    assert (again.read("x", 20, 40, True) == other.read("x", 20, 40)).all()


@needs("s3")
def test_files_of_a_store_on_an_object_store_are_looked_at_side_by_side(bucket, way, tmp_path):
    """Opening takes as long as the requests one behind the other otherwise."""
    copy_store(write(tmp_path / "a", segments=6).path, f"{bucket}/one")
    under_way, most, lock = 0, 0, threading.Lock()

    def slow(method, path):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1
        return False

    way.down = slow
    store = Store.open(f"{bucket}/one")
    assert most >= 8
    most = 0
    with pytest.raises(StoreError, match="another configuration"):
        StoreWriter(f"{bucket}/one", COLUMNS)
    StoreWriter(f"{bucket}/one", COLUMNS, chunk_rows=8).close()
    assert most >= 4
    way.down = lambda method, path: False
    assert (store.read("n") == np.arange(120)).all()
    store.folder(4).rmtree(["n"])
    with pytest.raises(StoreError) as error:
        Store.open(f"{bucket}/one")
    assert [line for line in str(error.value).splitlines() if "hurt" in line] == [
        f"  {store.folder(4)}/n/{name}: is missing; hurt: rows 80 to 99"
        for name in ("zarr.json", "c/0")
    ]
