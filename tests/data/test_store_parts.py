"""Parts: writers that do not know of each other, one store in the end; what `saex store` says."""

import fcntl
import json
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest

from saex.cli import main
from saex.data import Column, Store, StoreError, StoreWriter, merge_parts
from saex.data import store_tools as tools
from saex.data.store_lock import lock_folder
from saex.data.store_names import Names
from saex.harvest import Harvest, harvest
from saex.models import Several, Transformer
from tests import runs

COLUMNS = {"x": Column((6,), "float32"), "n": Column((), "int32")}
ROWS, PARTS = 900, 3
LOCK = Names().lock


def rows_of(part):
    n = np.arange(ROWS)[ROWS * part // PARTS : ROWS * (part + 1) // PARTS]
    return {"n": n, "x": np.sin(n[:, None] * np.arange(1, 7))}


def write(path, part, finish=True, parts=PARTS, meta=None):
    with StoreWriter(path, COLUMNS, meta, chunk_rows=16, part=(part, parts)) as writer:
        values = rows_of(part)
        for start in range(writer.cursor.get("next", 0), ROWS // PARTS, 100):
            writer.append({name: v[start : start + 100] for name, v in values.items()})
            writer.commit({"next": start + 100})
        if finish:
            writer.finish()


CHILD = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import test_store_parts
    test_store_parts.write(sys.argv[2], int(sys.argv[3]))
"""


def test_processes_write_parts_of_one_store_at_once(tmp_path, request):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(request.path.parent)]
    path = tmp_path / "store"
    children = [subprocess.Popen([*command, str(path), str(i)]) for i in range(PARTS)]
    assert [child.wait(120) for child in children] == [0] * PARTS
    store = merge_parts(path)
    store.verify()
    assert store.read("n").tolist() == list(range(ROWS)) and store.complete
    np.testing.assert_allclose(store.stats["x"].mean, store.read("x").mean(0), atol=1e-6)
    assert store.stats["x"].count == ROWS
    assert merge_parts(path).digest == store.digest  # again, as after a kill


RACE = """
    import sys, numpy as np
    from saex.data import Column, StoreError, StoreWriter
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with StoreWriter(sys.argv[1], {"n": Column((), "int32")}, chunk_rows=16) as writer:
            for at in range(writer.cursor.get("next", 0), 3000, 50):
                writer.append({"n": np.arange(at, at + 50)})
                writer.commit({"next": at + 50})
            writer.finish()
        print("wrote")
    except StoreError as err:
        print("refused" if "is being written by process" in str(err) else err)
"""


def test_of_writers_that_start_at_once_one_writes_and_the_others_are_told_who(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RACE), str(tmp_path / "store")]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert all(child.stdout.readline() == "ready\n" for child in children)
    for child in children:
        child.stdin.write("go\n"), child.stdin.flush()
    said = sorted(child.communicate(timeout=120)[0].strip() for child in children)
    # One that came when the first had finished finds nothing to do.
    assert set(said) <= {"refused", "wrote"} and "wrote" in said
    store = Store.open(tmp_path / "store")
    store.verify()
    assert store.read("n").tolist() == list(range(3000))
    folders = {p.name for p in (tmp_path / "store").glob("segment-*")}
    assert folders == {s.path for s in store.manifest.segments}


def test_a_refusal_waits_for_the_name_of_a_writer_that_has_only_just_locked(tmp_path):
    sign = "process 7 on elsewhere"
    with open(tmp_path / LOCK, "a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        signs = threading.Timer(0.2, lambda: print(sign, file=other, flush=True))
        signs.start()
        with pytest.raises(StoreError, match=f"is being written by {sign}"):
            lock_folder(tmp_path, LOCK)
        signs.join()
        other.truncate(0)  # as one whose disk is full
        with pytest.raises(StoreError, match="is being written by another process"):
            lock_folder(tmp_path, LOCK)
    lock_folder(tmp_path, LOCK).close()


def test_a_part_goes_on_where_it_was_stopped_and_touches_no_other(tmp_path):
    write(tmp_path, 0)
    with StoreWriter(tmp_path, COLUMNS, chunk_rows=16, part=(1, PARTS)) as writer:
        writer.append({n: v[:100] for n, v in rows_of(1).items()})
        writer.commit({"next": 100})
        with pytest.raises(StoreError, match="is being written by process"):
            StoreWriter(tmp_path, COLUMNS, chunk_rows=16, part=(1, PARTS))
        write(tmp_path, 2)  # another part meanwhile
    left = tmp_path / "segment-1of3-000001-0123456789ab"
    others = tmp_path / "segment-2of3-000009-0123456789ab"
    left.mkdir(), others.mkdir()
    write(tmp_path, 1)
    assert not left.exists() and others.exists()
    assert merge_parts(tmp_path).read("n").tolist() == list(range(ROWS))


def test_what_is_not_whole_is_not_merged(tmp_path):
    with pytest.raises(StoreError, match="nothing to merge"):
        merge_parts(tmp_path)
    write(tmp_path, 0)
    with pytest.raises(StoreError, match=r"lacks the parts \[1, 2\] of 3"):
        merge_parts(tmp_path)
    write(tmp_path, 1, finish=False)
    write(tmp_path, 2)
    with pytest.raises(StoreError, match=r"manifest.1of3.json .* is not complete \(300 rows"):
        merge_parts(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    for part in range(3):
        write(tmp_path / "mixed", part, meta={"seed": part // 2})
    with pytest.raises(StoreError, match="differ in meta"):
        merge_parts(tmp_path / "mixed")
    write(tmp_path / "mixed", 0, parts=5, meta={"seed": 0})
    with pytest.raises(StoreError, match="different numbers of parts"):
        merge_parts(tmp_path / "mixed")
    with pytest.raises(StoreError, match=r"part=\(3, 3\)"):
        StoreWriter(tmp_path, COLUMNS, part=(3, 3))


def test_info_and_head_say_what_is_there(tmp_path, capsys):
    for part in range(PARTS):
        write(tmp_path, part)
    assert main(["store", "merge", str(tmp_path)]) == 0
    assert "900 rows in 9 segments" in capsys.readouterr().out
    assert main(["store", "info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == ROWS and found["columns"]["n"] == {
        "shape": [], "dtype": "int32", "bytes": 4 * ROWS,
    }  # fmt: skip
    norms = np.linalg.norm(Store.open(tmp_path).read("x"), axis=1)
    assert found["columns"]["x"]["norm_q50"] == pytest.approx(np.median(norms), rel=0.01)
    assert main(["store", "head", str(tmp_path), "--rows=2", "--start=899"]) == 0
    out = capsys.readouterr().out
    assert "row" in out and "899" in out and out.count("norm ") == 1


def test_head_shows_text_escaped(tmp_path):
    columns = {"tokens": Column((), "int32")}
    with StoreWriter(tmp_path, columns) as writer:
        writer.append({"tokens": np.array([27, 104])})
        writer.finish()
    rows = tools.head(Store.open(tmp_path), decode=lambda ids: chr(ids[0]))
    assert rows == [
        {"row": 0, "tokens": 27, "text": "\x1b"},
        {"row": 1, "tokens": 104, "text": "h"},
    ]
    assert "\x1b" not in tools.head_table(rows) and "\\x1b" in tools.head_table(rows)


@pytest.mark.parametrize("model", ["gpt2", 3, None, ["Transformer"], {"name": "gpt2"}, {}])
def test_head_takes_whatever_a_producer_wrote_of_its_model(tmp_path, capsys, model):
    with StoreWriter(tmp_path, {"tokens": Column((), "int32")}, {"model": model}) as writer:
        writer.append({"tokens": np.array([104])})
        writer.finish()
    assert main(["store", "head", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"row": 0, "tokens": 104}]


def test_head_shows_the_text_of_models_that_read_bytes(tmp_path, capsys):
    small = Transformer(d_model=8, n_layers=1, n_heads=1, d_mlp=8, context=8)
    both, params = Several((("a", small), ("b", small))), small.init(jax.random.key(0))
    text = runs.config(runs.write_text(tmp_path / "text").parent).text
    for model, given, site in (
        (small, params, "blocks.0.mlp_out"),
        (both, {"a": params, "b": params}, "a.blocks.0.mlp_out"),
    ):
        path = tmp_path / type(model).__name__
        harvest(model, given, text, "train", path, Harvest(rows=20, batch=2), sites=[site])
        assert main(["store", "head", str(path), "--rows=9", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert {row["text"] == chr(row["tokens"]) for row in shown if row["tokens"] < 256} == {True}


def test_verify_names_the_hurt_rows_and_fails(tmp_path, capsys):
    for part in range(PARTS):
        write(tmp_path, part)
    store = merge_parts(tmp_path)
    assert main(["store", "verify", str(tmp_path)]) == 0
    file = tmp_path / store.manifest.segments[4].path / "x/c/0/0"
    data = bytearray(file.read_bytes())
    data[16 * 24 + 4 + 1] ^= 1  # in the second chunk of segment 4, which begins at row 400
    file.write_bytes(data)
    assert main(["store", "verify", str(tmp_path)]) == 2
    assert "hurt: rows 416 to 431" in capsys.readouterr().err
