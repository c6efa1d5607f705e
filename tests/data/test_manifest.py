"""The manifest under flipped bits: whatever changes what it says is refused."""

import json

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter
from saex.data.manifest_json import from_json


@pytest.fixture
def manifest(tmp_path):
    """The text of a small one that has everything in it."""
    columns = {"x": Column((2,), "float32"), "s": Column((), "string")}
    with StoreWriter(tmp_path, columns, {"lr": 1e-5}, chunk_rows=4, non_finite="drop") as writer:
        for part in range(2):
            x = np.sin(np.arange(10.0) + part).reshape(5, 2)
            x[part] = np.nan
            writer.append({"x": x, "s": ["ü", "b", "c", "d", "e"]})
            writer.commit({"next": part})
        writer.append({"x": [[np.nan, 0.0]], "s": ["f"]})
        writer.finish()
    return tmp_path / "manifest.json"


def test_every_flipped_bit_is_refused_or_says_the_same(manifest):
    data = manifest.read_bytes()
    whole = json.dumps(json.loads(data), sort_keys=True)
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            try:
                text = flipped.decode()
            except UnicodeDecodeError:
                continue
            try:
                from_json(text, "it")
            except StoreError:
                refused += 1
            else:
                assert json.dumps(json.loads(text), sort_keys=True) == whole, (at, bit)
    assert refused > 5 * len(data)


def test_a_byte_that_is_no_text_is_refused(manifest):
    data = bytearray(manifest.read_bytes())
    data[10] ^= 128
    manifest.write_bytes(data)
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open(manifest.parent)


def test_a_checksum_may_be_missing_and_other_keys_may_come_with_one(manifest):
    """As the format has it: other writers may leave it out, and newer ones say more."""
    body = json.loads(manifest.read_text())
    del body["checksum"]
    rows = from_json(json.dumps(body), "it").rows
    assert rows == 8
    with pytest.raises(StoreError, match="has no checksum, but 'chdcksum', which version 2 does"):
        from_json(json.dumps({**body, "chdcksum": "0" * 64}), "it")
    from saex.data.manifest import json_sha256

    newer = {**body, "more": 1}
    assert from_json(json.dumps({**newer, "checksum": json_sha256(newer)}), "it").rows == 8
