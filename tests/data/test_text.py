"""Sources of documents: stable order, a split that never overlaps, chunks that lose nothing."""

import builtins
import json
import re

import numpy as np
import pytest

from saex.data import SOURCES
from saex.data.text import Document, Files, Stdlib, Table, chunk, split_of
from saex.models.transformer import BOS, decode, encode
from saex.registry import make


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def both(source):
    return {s: {d.name: d.text for d in source.documents(s)} for s in ("train", "heldout")}


def test_the_split_of_a_name_is_the_same_everywhere():
    # Written out: a change of the rule would score shipped weights on what they were trained on.
    heldout = ["argparse.py", "pickletools.py", "turtle.py"]
    train = ["json/decoder.py", "typing.py", "pydoc_data/topics.py", "os.py"]
    assert [split_of(n) for n in heldout] == ["heldout"] * 3
    assert [split_of(n) for n in train] == ["train"] * 4
    share = np.mean([split_of(f"folder/{i}.txt") == "heldout" for i in range(20000)])
    assert 0.11 < share < 0.13


def test_stdlib_is_split_without_overlap_and_in_stable_order():
    splits = both(Stdlib())
    assert not splits["train"].keys() & splits["heldout"].keys()
    assert not set(splits["train"].values()) & set(splits["heldout"].values())
    assert sum(map(len, splits["train"].values())) > 8e6
    assert sum(map(len, splits["heldout"].values())) > 1.1e6
    for split, documents in splits.items():
        assert list(documents) == sorted(documents)
        assert all(documents.values()) and all(split_of(n) == split for n in documents)
        skipped = re.compile(r"(^|/)(tests?|idle_test|site-packages|__pycache__|config-.*)/")
        assert not [n for n in documents if skipped.search(n) or not n.endswith(".py")]


def test_stdlib_of_another_folder(tmp_path):
    files = {"a.py": "a = 1\n", "test/b.py": "b", "json/c.py": "c", "config-3.11-x/d.py": "d"}
    files |= {"_sysconfigdata_x.py": "e", "site-packages/f/f.py": "f", "g.txt": "g", "h.py": ""}
    files |= {"sitecustomize.py": "i"}
    write(tmp_path, files)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    splits = both(Stdlib(str(tmp_path)))
    assert {**splits["train"], **splits["heldout"]} == {"a.py": "a = 1\n", "json/c.py": "c"}
    with pytest.raises(FileNotFoundError, match=r"no Python sources in .*nowhere"):
        list(Stdlib(str(tmp_path / "nowhere")).documents("train"))


def test_digest_depends_on_text_and_names_alone(tmp_path):
    names = [f"{i}.py" for i in range(40)]
    one = Stdlib(write(tmp_path / "one", {n: f"x = {n!r}" for n in names}))
    two = Stdlib(write(tmp_path / "two", {n: f"x = {n!r}" for n in reversed(names)}))
    assert one.digest("train") == two.digest("train") != one.digest("heldout")
    changed = next(n for n in names if split_of(n) == "train")
    (tmp_path / "two" / changed).write_text("x = 0")
    assert one.digest("train") != two.digest("train")
    assert one.digest("heldout") == two.digest("heldout")


def test_files_of_a_folder_a_glob_and_one_file(tmp_path):
    files = {f"deep/{i}.md": f"text {i}" for i in range(30)} | {"a.txt": "plain", ".b/c.md": "no"}
    root = write(tmp_path, files)
    expected = {f"deep/{i}.md": f"text {i}" for i in range(30)}
    splits = both(Files(root))
    assert {**splits["train"], **splits["heldout"]} == {**expected, "a.txt": "plain"}
    assert splits["train"] and splits["heldout"]
    assert both(Files(f"{root}/**/*.md")) == {
        s: {n: t for n, t in documents.items() if n != "a.txt"} for s, documents in splits.items()
    }
    assert both(Files(f"{root}/a.txt"))[split_of("a.txt")] == {"a.txt": "plain"}


def test_a_document_keeps_its_side_when_others_come(tmp_path):
    before = both(Files(write(tmp_path, {f"{i}.txt": str(i) for i in range(50)})))
    after = both(Files(write(tmp_path, {f"new{i}.txt": str(i) for i in range(50)})))
    for split in ("train", "heldout"):
        assert before[split].items() <= after[split].items()


def test_bytes_that_are_no_utf8_and_empty_files(tmp_path):
    root = write(tmp_path, {"latin.txt": b"caf\xe9\r\n", "empty.txt": b"", "z.txt": b"\x00\n"})
    splits = both(Files(root))
    assert {**splits["train"], **splits["heldout"]} == {
        "latin.txt": "caf\ufffd\r\n",
        "z.txt": "\x00\n",
    }


def test_missing_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*gone' does not exist"):
        list(Files(str(tmp_path / "gone")).documents("train"))
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.rst"):
        list(Files(f"{tmp_path}/*.rst").documents("train"))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        list(Files(str(tmp_path)).documents("train"))
    with pytest.raises(FileNotFoundError, match=r"table '.*gone\.jsonl' does not exist"):
        list(Table(str(tmp_path / "gone.jsonl")).documents("train"))
    for source in (Stdlib(), Files(str(tmp_path)), Table("x.jsonl")):
        with pytest.raises(ValueError, match="unknown split 'test': expected one of train, held"):
            source.documents("test")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    root = write(tmp_path, {"secret.txt": "x"})
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(OSError, match=r"cannot read '.*secret\.txt' \(Permission denied\)"):
        both(Files(root))


ROWS = [{"id": f"doc-{i}", "text": f"text {i}", "body": f"body {i}"} for i in range(30)]


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return str(path)


def test_jsonl(tmp_path):
    path = jsonl(tmp_path / "t.jsonl", [*ROWS, {"id": "empty", "text": "", "body": "b"}])
    splits = both(Table(path, id="id"))
    assert {**splits["train"], **splits["heldout"]} == {r["id"]: r["text"] for r in ROWS}
    assert all(split_of(n) == s for s, documents in splits.items() for n in documents)
    bodies = both(Table(path, text="body"))
    assert sorted({**bodies["train"], **bodies["heldout"]}.values())[:2] == ["b", "body 0"]
    assert "row 1" in {**bodies["train"], **bodies["heldout"]}


def test_cut_emoji_in_jsonl_become_replacement_characters(tmp_path):
    file = tmp_path / "cut.jsonl"
    texts = [
        "ok \U0001f9ea",
        "\ud83e cut",
        "\udc00\ud83e",
        "nul \x00 bom \ufeff rtl \u202e e\u0301",
    ]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = Table(str(file))
    found = {d.name: d.text for split in ("train", "heldout") for d in source.documents(split)}
    assert [found[f"row {i}"] for i in range(1, 5)] == [
        texts[0], "\ufffd cut", "\ufffd\ufffd", texts[3],
    ]  # fmt: skip
    assert source.digest("train") and all(text.encode() for text in found.values())


def test_bad_jsonl_is_named_by_line(tmp_path):
    def error_of(lines, **fields):
        (tmp_path / "bad.jsonl").write_text(lines)
        with pytest.raises((ValueError, KeyError)) as caught:
            both(Table(str(tmp_path / "bad.jsonl"), **fields))
        return str(caught.value)

    good = '{"text": "a"}\n'
    assert "line 2 is no JSON" in error_of(good + '{"text": "b"\n')
    assert "line 3 is a JSON list" in error_of(good * 2 + "[1]\n")
    assert "line 2 has no column 'text': it has txt" in error_of(good + '{"txt": "b"}')
    assert "has no column 'body'" in error_of(good, text="body")
    assert "row 2: column 'text' holds int, expected text" in error_of(good + '{"text": 3}')


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = str(tmp_path / "t.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=7)
    assert both(Table(path, id="id")) == both(Table(jsonl(tmp_path / "t.jsonl", ROWS), id="id"))
    with pytest.raises(KeyError, match="has no column 'content': it has id, text, body"):
        both(Table(path, text="content"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'saex\[parquet\]'"):
        both(Table(str(tmp_path / "t.parquet")))


@pytest.mark.parametrize("context", [2, 5, 256])
def test_chunks_give_the_text_back(context):
    texts = ["a", "", "naïve text\n" * 40, "x" * (context - 1), "y" * context, "∑"]
    documents = [Document(str(i), t) for i, t in enumerate(texts)]
    chunks = list(chunk(iter(documents), encode, context, BOS))
    back = [b""] * len(texts)
    for c in chunks:
        assert c.tokens.dtype == np.int32 and c.tokens.shape == (context,)
        assert c.tokens[0] == BOS and 2 <= c.length <= context
        assert not c.tokens[c.length :].any()
        assert c.start == len(back[c.document])
        back[c.document] += bytes(c.tokens[1 : c.length].tolist())
    assert [b.decode() for b in back] == texts
    assert decode(chunks[0].tokens[: chunks[0].length]) == "a"
    assert sum(c.length < context for c in chunks) <= len(texts)


def test_chunks_need_room():
    with pytest.raises(ValueError, match="context is 1, expected at least 2"):
        list(chunk(iter([Document("a", "a")]), encode, 1, BOS))


def test_sources_are_config_sections(tmp_path):
    assert make(SOURCES, {"name": "stdlib"}) == Stdlib()
    assert make(SOURCES, {"name": "table", "path": "a.jsonl", "text": "t"}) == Table("a.jsonl", "t")
    with pytest.raises(ValueError, match=r"config\.text\.name='stdlb'.*stdlib"):
        make(SOURCES, {"name": "stdlb"}, "config.text")
