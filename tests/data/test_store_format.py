"""A second reader, written by docs/store-format.md alone: JSON, numpy and SHA-256."""

import hashlib
import json

import ml_dtypes
import numpy as np

from saex.data import Column, Store, StoreWriter


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


def read_column(path, name):
    """All rows of a column; bfloat16 as uint16 bits. Checks all that the page says can be."""
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == "saex-store" and manifest["version"] == 1
    checksum = manifest.pop("checksum")
    assert canonical_sha256(manifest) == checksum
    shape, dtype = manifest["columns"][name]["shape"], manifest["columns"][name]["dtype"]
    dtype = {"bfloat16": "<u2", "float32": "<f4", "int32": "<i4", "int8": "<i1"}[dtype]
    chunk_rows, parts = manifest["chunk_rows"], []
    row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    for segment in manifest["segments"]:
        file = name + "/c/0" + "/0" * len(shape)
        data = (path / segment["path"] / file).read_bytes()
        assert len(data) == segment["files"][file]["bytes"]
        assert hashlib.sha256(data).hexdigest() == segment["files"][file]["sha256"]
        chunks = -(-segment["rows"] // chunk_rows)
        index, crc = data[-16 * chunks - 4 : -4], data[-4:]
        assert crc32c_bitwise(index) == int.from_bytes(crc, "little")
        rows = []
        for offset, size in np.frombuffer(index, "<u8").reshape(chunks, 2).tolist():
            chunk = data[offset : offset + size]
            assert size == chunk_rows * row_bytes + 4
            assert crc32c_bitwise(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
            rows.append(np.frombuffer(chunk[:-4], dtype).reshape(chunk_rows, *shape))
        parts.append(np.concatenate(rows)[: segment["rows"]])
    return np.concatenate(parts), manifest


def test_the_page_is_enough_to_read_a_store(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 7)).astype(ml_dtypes.bfloat16)
    y = rng.standard_normal((300, 2, 3)).astype(np.float32)
    columns = {
        "x": Column((7,)),
        "y": Column((2, 3), "float32"),
        "n": Column((), "int32"),
        "q": Column((4,), "int8"),
    }
    q, n = rng.integers(-128, 128, (300, 4), np.int8), np.arange(300, dtype=np.int32)
    with StoreWriter(tmp_path, columns, {"who": "ünicode", "lr": 1e-05}, chunk_rows=32) as writer:
        for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
            writer.append({"x": x[part], "y": y[part], "n": n[part], "q": q[part]})
            writer.commit({"next": part.stop})
        writer.finish()
    assert (read_column(tmp_path, "x")[0] == x.view(np.uint16)).all()
    for name, values in (("y", y), ("n", n), ("q", q)):
        assert (read_column(tmp_path, name)[0] == values).all()
    manifest = read_column(tmp_path, "n")[1]
    shards = [
        {
            "rows": s["rows"],
            **{
                c: s["files"][f"{c}/c/0" + "/0" * len(manifest["columns"][c]["shape"])]["sha256"]
                for c in manifest["columns"]
            },
        }
        for s in manifest["segments"]
    ]
    content = {"columns": manifest["columns"], "meta": manifest["meta"], "shards": shards}
    assert canonical_sha256(content) == Store.open(tmp_path).digest
    stats = manifest["stats"]["y"]
    np.testing.assert_allclose(np.array(stats["sum"]) / stats["count"], y.mean(0), atol=1e-6)
