"""Columns of short strings: a list for each segment, one numbering for who reads."""

import json

import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter, merge_parts
from saex.data import store_tools as tools
from saex.data.manifest import json_sha256
from saex.data.mixed import Mixed
from saex.data.split import Part, held_out
from saex.data.stream import Stream

COLUMNS = {"label": Column((), "string"), "n": Column((), "int32")}
MESS = [
    "",
    "ünïcode",
    "u\u0308",
    "ü",
    "日本",
    "\U0001f9ea\u200d",
    "a\x00",
    "a",
    '\n\t"\\',
    "‮abc",
    "\ufeff",
]


def write(path, parts, **options):
    with StoreWriter(path, COLUMNS, chunk_rows=8, **options) as writer:
        for values in parts:
            start = writer.rows
            writer.append({"label": values, "n": np.arange(start, start + len(values))})
            writer.commit({})
        writer.finish()
    return None if "part" in options else Store.open(path)


def texts(store, *span):
    strings = store.strings("label")
    return [strings[i] for i in store.read("label", *span)]


def test_strings_come_back_whatever_segments_they_are_in(tmp_path):
    parts = [MESS, ["b", "a", "b"], ["zebra", *MESS[::-1]], [""]]
    store = write(tmp_path, parts)
    store.verify()
    whole = [text for part in parts for text in part]
    assert texts(store) == whole
    for start, stop in ((0, 3), (10, 14), (13, 25), (26, 26)):
        for checksums in (False, True):
            assert texts(store, start, stop, checksums) == whole[start:stop]
    assert store.strings("label") == tuple(sorted(set(whole)))
    assert store.read("label").dtype == np.int32
    own = json.loads(
        (tmp_path / store.manifest.segments[1].path / "label/strings.json").read_text()
    )
    assert own == ["a", "b"]  # its own strings alone, so segments can be put into other stores
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2


def test_lists_arrays_and_shuffled_segments(tmp_path):
    values = np.array(["x", "yy", "x", "zzz", "yy"])
    with StoreWriter(tmp_path, COLUMNS) as writer:
        for kind in (values, values.astype(object), values.tolist(), tuple(values), []):
            writer.append({"label": kind, "n": np.arange(len(kind))})
        writer.commit({}, shuffle=(3,))
        writer.finish()
    store = Store.open(tmp_path)
    assert [values[n] for n in store.read("n")] == texts(store)


def test_parts_of_different_strings_become_one_store(tmp_path):
    for i, values in enumerate((["b", "c", "b"], ["a", "c"], ["d", "b", "ü"])):
        write(tmp_path, [values], part=(i, 3))
    store = merge_parts(tmp_path)
    store.verify()
    assert texts(store) == ["b", "c", "b", "a", "c", "d", "b", "ü"]
    assert store.strings("label") == ("a", "b", "c", "d", "ü")


def test_rules_name_strings(tmp_path):
    labels = [["cat", "dog", "ünï"][i % 3] for i in range(300)]
    store = write(tmp_path, [labels[:100], labels[100:]])
    rules = {"label": ("dog", "ünï"), "n": (0,)}
    batches = Stream(batch=16, lanes=1, exclude=rules).open(store, ["n", "label"], 0)
    found = batches.gather(0, batches.rows)
    assert sorted(found["n"].tolist()) == list(range(3, 300, 3))
    assert {store.strings("label")[i] for i in found["label"]} == {"cat"}
    assert batches.info["rows_excluded_by_label"] == 200
    batches.close()
    with pytest.raises(StoreError, match=r"by label 'dig', but no row .* among them 'dog'"):
        Stream(batch=16, exclude={"label": ("dig",)}).open(store, ["n"], 0)
    with pytest.raises(StoreError, match="or strings of a column of strings"):
        Stream(batch=16, exclude={"label": (1,)}).open(store, ["n"], 0)


def test_mixed_stores_have_one_numbering(tmp_path):
    a = write(tmp_path / "a", [["b", "d"] * 100])
    b = write(tmp_path / "b", [["a", "d", "c"] * 100])
    mixed = Mixed([Part(a, "train"), b], [1.0, 1.0], tmp_path)
    names = mixed.strings("label")
    assert names == ("a", "b", "c", "d")
    rows = Part(a, "train").rows
    assert [names[i] for i in mixed.read("label", rows, rows + 4)] == ["a", "d", "c", "a"]
    batches = Stream(batch=64, exclude={"label": ("c",)}).open(mixed, ["label", "n"], 0)
    found = batches.gather(0, 128)
    batches.close()
    got = {names[i] for i in found["label"]}
    assert got == {"a", "b", "d"}
    assert texts(a, 0, 4) == ["b", "d", "b", "d"]  # the stores themselves number as before


def test_documents_named_by_strings_keep_their_side_when_others_come(tmp_path):
    def sides(path, names):
        columns = {"document": Column((), "string")}
        with StoreWriter(path, columns) as writer:
            writer.append({"document": names})
            writer.finish()
        store = Store.open(path)
        strings = store.strings("document")
        return {strings[i] for i in Part(store, "heldout").read("document")}

    names = [f"doc {i}" for i in range(2000)]
    few, many = sides(tmp_path / "few", names[1000:]), sides(tmp_path / "many", names)
    assert few == many & set(names[1000:]) and 0.08 < len(many) / 2000 < 0.16
    assert held_out(np.arange(2000)).mean() == pytest.approx(0.12, abs=0.03)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([1, 2], "row 0 of what was given is 1"),
        (["a", None], "row 1 of what was given is None"),
        (["a", ["b"]], r"row 1 of what was given is \['b'\]"),
        (["a", "\ud800"], "row 1 .* not Unicode text"),
        (["a" * 1025, "b"], "a string of 1025 bytes; short strings have at most 1024"),
        ("ab", "expected a list"),
        (np.zeros((2, 2), "U1"), r"shape \(2, 2\); expected \[rows\]"),
        (["a"], "unequal length"),
    ],
)
def test_what_is_no_short_string_is_refused_and_nothing_taken(tmp_path, values, match):
    with StoreWriter(tmp_path, COLUMNS) as writer:
        with pytest.raises(StoreError, match=match):
            writer.append({"label": values, "n": np.arange(2)})
        assert writer.buffered == 0
    with pytest.raises(StoreError, match="one string a row"):
        StoreWriter(tmp_path / "new", {"x": Column((3,), "string")})


def test_altered_lists_and_numbers_are_found(tmp_path):
    store = write(tmp_path, [["a", "b"] * 10, ["c"]])
    file = tmp_path / store.manifest.segments[0].path / "label/strings.json"
    text = file.read_text()
    file.write_text(text.replace("b", "x"))
    with pytest.raises(StoreError, match=r"label/strings.json: does not match its checksum"):
        Store.open(tmp_path)
    again = Store(tmp_path, store.manifest)  # altered after it was opened
    for bad, match in (
        ("{}", "no list"),
        ('["b", "a"]', "not in order"),
        ('["\\ud800"]', "surrog"),
    ):
        file.write_text(bad)
        with pytest.raises(StoreError, match=rf"strings.json cannot be read .*{match}"):
            again.strings("label")
    file.write_text(text)
    shard = tmp_path / store.manifest.segments[0].path / "label/c/0"
    data = bytearray(shard.read_bytes())
    data[4] = 77
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"label/c/0: holds numbers that stand for no string"):
        Store.open(tmp_path).read("label")
    with pytest.raises(StoreError, match=r"column .n. .* is int32: it has no strings"):
        again.strings("n")


def test_strings_are_part_of_the_identity(tmp_path):
    a, b = write(tmp_path / "a", [["x", "y"]]), write(tmp_path / "b", [["x", "z"]])
    shard = "label/c/0"
    assert a.manifest.segments[0].files[shard] == b.manifest.segments[0].files[shard]
    assert a.digest != b.digest


def test_the_tools_show_strings_escaped(tmp_path):
    store = write(tmp_path, [["\x1b[31mred", "ü"]])
    assert tools.head(store)[0]["label"] == "\x1b[31mred"
    assert "\x1b" not in tools.head_table(tools.head(store))
    assert tools.info(store)["columns"]["label"]["dtype"] == "string"


def test_a_store_of_version_1_cannot_hold_them(tmp_path):
    write(tmp_path, [["a"]])
    file = tmp_path / "manifest.json"
    body = json.loads(file.read_text()) | {"version": 1}
    body["checksum"] = json_sha256({k: v for k, v in body.items() if k != "checksum"})
    file.write_text(json.dumps(body))
    with pytest.raises(StoreError, match="version 1 has no strings"):
        Store.open(tmp_path)
