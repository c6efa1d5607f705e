"""A second reader, written by docs/store-format.md alone: JSON, numpy and SHA-256."""

import hashlib
import json

import ml_dtypes
import numpy as np

from saex.data import Column, Store, StoreWriter, calibrate


def crc32c_bitwise(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def canonical_sha256(value) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def open_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == "saex-store" and manifest["version"] in (1, 2)
    checksum = manifest.pop("checksum")
    assert canonical_sha256(manifest) == checksum
    return manifest


DTYPES = {"bfloat16": "<u2", "float32": "<f4", "int32": "<i4", "int8": "<i1", "string": "<i4"}
DTYPES |= {"int64": "<i8", "int16": "<i2", "uint8": "u1"}


def checked(path, segment, file):
    data = (path / segment["path"] / file).read_bytes()
    assert len(data) == segment["files"][file]["bytes"]
    assert hashlib.sha256(data).hexdigest() == segment["files"][file]["sha256"]
    return data


def read_shard(path, segment, name, shape, dtype, chunk_rows):
    """Rows of a stored column in one segment; bfloat16 as uint16 bits."""
    data = checked(path, segment, name + "/c/0" + "/0" * len(shape))
    row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    chunks = -(-segment["rows"] // chunk_rows)
    assert len(data) == chunks * (chunk_rows * row_bytes + 4) + 16 * chunks + 4
    index, crc = data[-16 * chunks - 4 : -4], data[-4:]
    assert crc32c_bitwise(index) == int.from_bytes(crc, "little")
    rows = []
    for offset, size in np.frombuffer(index, "<u8").reshape(chunks, 2).tolist():
        chunk = data[offset : offset + size]
        assert size == chunk_rows * row_bytes + 4
        assert crc32c_bitwise(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
        rows.append(np.frombuffer(chunk[:-4], dtype).reshape(chunk_rows, *shape))
    return np.concatenate(rows)[: segment["rows"]]


def read_column(path, name):
    """All rows: numbers, float32 for bfloat16 and for int8 with scales, a list of strings."""
    manifest = open_manifest(path)
    column = manifest["columns"][name]
    if "scales" in column:
        x = read_column(path, name + ".codes").astype("f4") * np.array(column["scales"], "f4")
        if column["outliers"]:
            x[..., column["outliers"]] = read_column(path, name + ".outliers")
        return x
    args = column["shape"], DTYPES[column["dtype"]], manifest["chunk_rows"]
    parts = [(s, read_shard(path, s, name, *args)) for s in manifest["segments"]]
    if column["dtype"] == "string":
        lists = [(json.loads(checked(path, s, f"{name}/strings.json")), rows) for s, rows in parts]
        return [strings[i] for strings, rows in lists for i in rows]
    rows = np.concatenate([rows for _, rows in parts])
    if column["dtype"] == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows


def test_the_page_is_enough_to_read_a_store(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 7)).astype(ml_dtypes.bfloat16)
    y = rng.standard_normal((300, 2, 3)).astype(np.float32)
    z = y * [1.0, 10.0, 100.0]
    z[::20, 0, 1] *= 500
    label = [["", "ünïcode", "\U0001f9ea", "a\x00"][i % (1 + i // 100)] for i in range(300)]
    columns = {
        "x": Column((7,)),
        "y": Column((2, 3), "float32"),
        "z": calibrate(z, max_outliers=1),
        "n": Column((), "int32"),
        "q": Column((4,), "int8"),
        "label": Column((), "string"),
        "i64": Column((), "int64"),
        "i16": Column((3,), "int16"),
        "u8": Column((2, 2), "uint8"),
    }
    q, n = rng.integers(-128, 128, (300, 4), np.int8), np.arange(300, dtype=np.int32)
    values = {"x": x, "y": y, "z": z, "n": n, "q": q}
    for name, dtype in (("i64", np.int64), ("i16", np.int16), ("u8", np.uint8)):  # to their ends
        ends, shape = np.iinfo(dtype), columns[name].shape
        values[name] = rng.integers(ends.min, ends.max, (300, *shape), dtype, endpoint=True)
        values[name].reshape(300, -1)[:2, 0] = ends.min, ends.max
    with StoreWriter(tmp_path, columns, {"who": "ünicode", "lr": 1e-05}, chunk_rows=32) as writer:
        for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
            given = {name: array[part] for name, array in values.items()}
            writer.append({**given, "label": label[part]})
            writer.commit({"next": part.stop})
        writer.finish()
    store, manifest = Store.open(tmp_path), open_manifest(tmp_path)
    for name, array in values.items():
        found = read_column(tmp_path, name)
        assert name == "z" or (found == array.astype(found.dtype)).all()
        assert (found == store.read(name).astype(found.dtype)).all()
    assert read_column(tmp_path, "label") == label
    z_column = manifest["columns"]["z"]
    assert z_column["outliers"] == [1] and list(store.columns) == list(manifest["columns"])
    error = np.abs(read_column(tmp_path, "z") - z).max((0, 1)) / np.array(z_column["scales"])
    assert error[[0, 2]].max() < 0.5001
    assert (read_column(tmp_path, "z.codes")[..., 1] == 0).all()
    shards = []
    for segment in manifest["segments"]:
        files = {
            name: f"{name}/c/0" + "/0" * len(c["shape"])
            for name, c in manifest["columns"].items()
            if "scales" not in c
        } | {"label/strings.json": "label/strings.json"}
        hashes = {name: segment["files"][file]["sha256"] for name, file in files.items()}
        shards.append({"rows": segment["rows"], **hashes})
        sizes = [len(checked(tmp_path, segment, file)) for file in segment["files"]]
        assert len(sizes) == 2 * len(files)  # zarr.json of each, strings.json, stats.json
    content = {"columns": manifest["columns"], "meta": manifest["meta"], "shards": shards}
    assert canonical_sha256(content) == store.digest
    for name in ("y", "z"):
        stats, rows = manifest["stats"][name], read_column(tmp_path, name).astype(np.float64)
        np.testing.assert_allclose(stats["sum"], rows.sum(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats["sum_sq"], (rows**2).sum(0), rtol=1e-9)
        sizes = np.sqrt((rows.reshape(300, -1) ** 2).sum(1)).astype(np.float32)
        bins, counts = np.unique(sizes.view(np.uint32) >> 16, return_counts=True)
        assert stats["norms"] == dict(zip(map(str, bins.tolist()), counts.tolist()))
    assert manifest["stats"]["label"] == {"count": 300} and manifest["version"] == 2
    assert_statistics_are_those_of_the_segments(tmp_path, manifest)


def assert_statistics_are_those_of_the_segments(path, manifest):
    """Added up from left to right, to the bit; counts of norms key by key."""
    parts = [json.loads(checked(path, s, "stats.json")) for s in manifest["segments"]]
    for name, whole in manifest["stats"].items():
        assert whole["count"] == sum(part[name]["count"] for part in parts)
        for key in {"sum", "sum_sq"} & set(whole):
            total = np.float64(0)
            for part in parts:
                total = total + np.array(part[name][key])
            assert total.tolist() == whole[key]
        if "norms" in whole:
            keys = {key for part in parts for key in part[name]["norms"]}
            assert whole["norms"] == {
                key: sum(part[name]["norms"].get(key, 0) for part in parts) for key in keys
            }


def test_a_store_of_old_columns_is_of_version_1(tmp_path):
    with StoreWriter(tmp_path, {"x": Column((3,)), "q": Column((2,), "int8")}) as writer:
        writer.append({"x": np.ones((5, 3)), "q": np.ones((5, 2), np.int8)})
        writer.finish()
    manifest = open_manifest(tmp_path)
    assert manifest["version"] == 1
    assert manifest["columns"]["q"] == {"shape": [2], "dtype": "int8"}


def test_a_zarr_library_reads_the_same(tmp_path):
    """tensorstore, told nothing but the folder."""
    import tensorstore as ts

    x = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    columns = {"x": calibrate(x), "label": Column((), "string")}
    with StoreWriter(tmp_path, columns, chunk_rows=16) as writer:
        writer.append({"x": x, "label": ["b", "a"] * 35})
        writer.finish()
    folder = tmp_path / Store.open(tmp_path).manifest.segments[0].path
    for name, expected in (("x.codes", read_column(tmp_path, "x.codes")), ("label", [1, 0] * 35)):
        kvstore = {"driver": "file", "path": str(folder / name)}
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        assert (array == expected).all()
