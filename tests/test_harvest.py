"""Harvest: what is written, where it goes on, what it refuses."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.data import room
from saex.data.manifest import StoreError
from saex.data.store import Store, load_manifest
from saex.data.text import Document, Table
from saex.harvest import Harvest, harvest
from saex.registry import ConfigError
from tests import runs


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where that can be: each commit waits for the disk many times."""
    shm = pathlib.Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm, prefix="saex-test-") as folder:
        yield pathlib.Path(folder)


CONTEXT = 16
CFG = Harvest(rows=2000, heldout_rows=300, batch=4, segment_rows=300, chunk_rows=64, shuffle=False)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A stand-in subject model: sites that are simple functions of token and position."""

    context: int = CONTEXT
    nan_token: int = -1

    @property
    def sites(self):
        return {"early": 8, "late": 4, "never": 4}

    def run(self, params, tokens, taps=(), edits=None, stop_at=None):
        assert tokens.shape == (CFG.batch, self.context)
        acts = {}
        mixed = jnp.cumsum(params["embed"][tokens], axis=1)
        for site, width in self.sites.items():
            assert site != "never", "computed past the last site that is needed"
            x = jnp.sin(mixed[..., :width] * (1 + width))
            acts[site] = jnp.where((tokens == self.nan_token)[..., None], jnp.nan, x)
            if site == stop_at:
                return None, {k: v for k, v in acts.items() if k in taps}
        raise AssertionError("no stop_at")


@dataclasses.dataclass(frozen=True)
class Letters:
    """Documents of known content: their number, then letters."""

    documents_: int = 40
    length: int = 53

    def documents(self, split):
        for i in range(self.documents_):
            text = f"{split} {i} " + "abcdefghijklm" * 4
            yield Document(f"{split}-{i}", text[: self.length + i % 7])

    def digest(self, split):
        return f"{split}-{self.documents_}-{self.length}"


MODEL, SOURCE = Toy(), Letters()
PARAMS = {"embed": jax.random.normal(jax.random.key(0), (257, 8))}


def run(path, split="train", model=MODEL, cfg=CFG, source=SOURCE, **kwargs):
    kwargs = {"sites": ("early", "late"), **kwargs}
    return harvest(model, PARAMS, source, split, path, cfg, **kwargs)


def content(store):
    return {n: store.read(n).tobytes() for n in store.columns}


def test_rows_are_the_sites_of_their_tokens(tmp_path):
    store = run(tmp_path)
    assert store.complete and list(store.columns) == [
        "early", "late", "early.norm", "late.norm", "tokens", "document", "position",
    ]  # fmt: skip
    tokens, position = store.read("tokens"), store.read("position")
    assert (tokens[position == 0] == 256).all() and (tokens[position > 0] < 256).all()
    starts = np.flatnonzero(position == 0)
    texts = [d.text for d in SOURCE.documents("train")]
    for begin, end in zip(starts, [*starts[1:], store.rows]):
        context, document = tokens[begin:end], store.read("document", begin, end)
        assert (position[begin:end] == np.arange(end - begin)).all()
        assert len(set(document)) == 1
        assert bytes(context[1:].astype(np.uint8)).decode() in texts[document[0]]
        mixed = np.cumsum(np.asarray(PARAMS["embed"])[context], axis=0)
        late = store.read("late", begin, end).astype(np.float32)
        np.testing.assert_allclose(late, np.sin(mixed[:, :4] * 5), atol=1e-2)


def test_rows_of_a_training_segment_are_shuffled_by_default(tmp_path):
    cfg = dataclasses.replace(CFG, shuffle=True)
    plain, store = run(tmp_path / "plain"), run(tmp_path / "shuffled", cfg=cfg)
    at = 0
    for segment in store.manifest.segments:
        stop = at + segment.rows
        rows = [
            sorted(zip(*(s.read(n, at, stop).tolist() for n in ("document", "position", "tokens"))))
            for s in (plain, store)
        ]
        assert rows[0] == rows[1], "a row left its segment"
        document = store.read("document", at, stop)
        assert segment.rows < 100 or (document[1:] == document[:-1]).mean() < 0.3
        at = stop
    norms = np.linalg.norm(store.read("late").astype(np.float32), axis=1)
    np.testing.assert_allclose(store.read("late.norm"), norms, rtol=1e-6)
    shutil.rmtree(tmp_path / "shuffled" / store.manifest.segments[2].path)
    assert run(tmp_path / "shuffled", cfg=cfg).digest == store.digest
    heldout = [run(tmp_path / f"h{i}", split="heldout", cfg=c) for i, c in enumerate((cfg, CFG))]
    assert content(heldout[0]) == content(heldout[1])


def test_norms_are_of_what_is_stored(tmp_path):
    store = run(tmp_path)
    for site in ("early", "late"):
        norms = np.linalg.norm(store.read(site).astype(np.float32), axis=1)
        np.testing.assert_allclose(store.read(f"{site}.norm"), norms, rtol=1e-6)
    plain = run(tmp_path / "plain", cfg=dataclasses.replace(CFG, norms=False))
    assert "early.norm" not in plain.columns


@pytest.mark.parametrize("stop", [0, 5, 9])
def test_parts_make_the_same_rows_as_one_writer(tmp_path, stop):
    whole, cfg = run(tmp_path / "whole"), dataclasses.replace(CFG, parts=3)

    def kill(*_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    if stop:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", cfg=cfg, progress=kill)
        with pytest.raises(StoreError, match=r"has no manifest.json"):
            Store.open(tmp_path / "parts")
    store = run(tmp_path / "parts", cfg=cfg)
    store.verify()
    for name in ("tokens", "document", "position"):
        assert (store.read(name) == whole.read(name)).all()
    np.testing.assert_allclose(store.read("late.norm"), whole.read("late.norm"), rtol=1e-2)
    shutil.rmtree(tmp_path / "parts" / store.manifest.segments[-2].path)
    assert run(tmp_path / "parts", cfg=cfg).digest == store.digest


def test_rows_with_nan_are_dropped_and_counted_by_config(tmp_path):
    cfg = dataclasses.replace(CFG, non_finite="drop")
    whole = run(tmp_path / "whole")
    store = run(tmp_path / "holes", cfg=cfg, model=Toy(nan_token=ord("m")))
    kept = whole.read("tokens") != ord("m")
    assert store.read("tokens").tolist() == whole.read("tokens")[kept].tolist()
    assert store.manifest.dropped == (~kept).sum() > 0


def test_int8_sites_are_within_half_a_step_and_gone_on_with_the_same_scales(tmp_path, caplog):
    cfg = dataclasses.replace(CFG, dtype="int8", calibration_rows=500)
    whole = run(tmp_path / "plain", cfg=dataclasses.replace(CFG, dtype="float32"))

    def kill(*_, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "int8", cfg=cfg, progress=kill)
    scales = Store(tmp_path / "int8", load_manifest(tmp_path / "int8")).columns["late"].scales
    store = run(tmp_path / "int8", cfg=cfg)
    store.verify()
    for site in ("early", "late"):
        column = store.columns[site]
        error = np.abs(store.read(site) - whole.read(site)).max(0)
        assert (error <= np.array(column.scales) / 2 * 1.0001).all() and column.dtype == "int8"
        assert store.stats[site].clipped == 0
    assert store.columns["late"].scales == scales
    assert (store.read("late.norm") == whole.read("late.norm")).all()  # of the rows themselves
    for name in ("tokens", "document", "position"):
        assert (store.read(name) == whole.read(name)).all()
    assert run(tmp_path / "int8", cfg=cfg).digest == store.digest
    parts = run(tmp_path / "parts", cfg=dataclasses.replace(cfg, parts=3))
    assert parts.columns == store.columns
    with pytest.raises(StoreError, match="another configuration"):
        run(tmp_path / "int8", cfg=dataclasses.replace(cfg, calibration_rows=10))


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
sys.path.insert(0, sys.argv[1])
import dataclasses, test_harvest
cfg = dataclasses.replace(test_harvest.CFG, dtype="int8", calibration_rows=500, parts=4)
print(test_harvest.run(sys.argv[4], cfg=cfg).digest)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_write_parts_with_the_scales_of_the_first(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, str(pathlib.Path(__file__).parent), port]
    children = [
        subprocess.Popen([*command, str(i), str(tmp_path / "two")], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    said = [child.communicate(timeout=300)[0].split()[-1].decode() for child in children]
    cfg = dataclasses.replace(CFG, dtype="int8", calibration_rows=500, parts=4)
    assert said == [run(tmp_path / "one", cfg=cfg).digest] * 2


def test_rows_that_are_not_stored_are_not_int8(tmp_path):
    with pytest.raises(ConfigError, match=r"harvest.dtype='int8': rows that are not stored"):
        runs.config(tmp_path, live__enabled=True, harvest__dtype="int8")
    assert Harvest(dtype="int8").made_as == "float32"  # what a batch takes on a device


def test_a_store_that_the_disk_has_no_room_for_is_refused_before_it_is_begun(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "saex")
    store = run(tmp_path / "fits")
    size = sum(f.bytes for s in store.manifest.segments for n, f in s.files.items() if "/c/" in n)
    told = next(r.getMessage() for r in caplog.records if " GB in all" in r.getMessage())
    assert f"{store.rows:,} rows, {size / 1e9:.3f} GB in all" in told
    usage = types.SimpleNamespace(free=size // 2)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"has no room on its disk: .* harvest.check_room=False"):
        run(tmp_path / "full")
    assert not (tmp_path / "full").exists()
    loose = dataclasses.replace(CFG, check_room=False)
    assert run(tmp_path / "full", cfg=loose).digest == store.digest


MESS = [
    "",
    "  \n\t",
    "\U0001f9ea\u200d",
    "e\u0301é",
    "a\x00b",
    "\ufeffbom",
    "‮rtl",
    "日本語" * 9,
    "\ud83e cut",
    "x",
]


def test_a_mess_of_documents_gives_their_bytes_and_no_rows_for_empty_ones(tmp_path):
    """Unicode of all kinds, documents without a byte, and one that is longer than two segments."""
    long = "".join(f"{i} " for i in range(400))
    texts = [*MESS, long, *MESS]
    file = tmp_path / "mess.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Table(str(file))
    documents = list(source.documents("train"))
    assert long in [d.text for d in documents] and "" not in [d.text for d in documents]
    assert len(long) > 2 * CFG.segment_rows
    store = run(tmp_path / "store", source=source, cfg=dataclasses.replace(CFG, rows=10**6))
    store.verify()
    tokens, document = store.read("tokens"), store.read("document")
    starts = np.flatnonzero(store.read("position") == 0)
    found = sorted(
        (int(document[a]), bytes(tokens[a + 1 : b].astype(np.uint8)))
        for a, b in zip(starts, [*starts[1:], store.rows])
    )
    expected = sorted(
        (i, d.text.encode()[at : at + CONTEXT - 1])
        for i, d in enumerate(documents)
        for at in range(0, len(d.text.encode()), CONTEXT - 1)
    )
    assert found == expected
    ends = np.cumsum([s.rows for s in store.manifest.segments])
    place = [d.text for d in documents].index(long)
    assert len(set(np.searchsorted(ends, np.flatnonzero(document == place), "right"))) > 2


def test_only_empty_documents_are_no_text(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text('{"text": ""}\n' * 30)
    with pytest.raises(ValueError, match="no tokens"):
        run(tmp_path / "store", source=Table(str(file)))


def test_budget_takes_whole_contexts_from_all_over_the_text(tmp_path):
    store = run(tmp_path, split="heldout")
    assert 300 - CONTEXT < store.rows <= 300
    assert len(set(store.read("document"))) > 10  # contexts are shuffled, not the first ones
    everything = run(tmp_path / "all", cfg=dataclasses.replace(CFG, rows=10**6))
    total = sum(len(d.text) + -(-len(d.text) // (CONTEXT - 1)) for d in SOURCE.documents("train"))
    assert everything.rows == total


def test_a_finished_store_is_opened_as_it_is(tmp_path):
    first = run(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("c/0*") if p.is_file()}
    progress = []
    again = run(tmp_path, progress=lambda *a: progress.append(a))
    assert not progress and again.digest == first.digest
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("c/0*") if p.is_file()}


@pytest.mark.parametrize("stop", [1, 7, 12, 30])
def test_stopped_and_gone_on_is_unbroken_bit_for_bit(tmp_path, stop):
    cfg = dataclasses.replace(CFG, shuffle=True)
    whole = run(tmp_path / "whole", cfg=cfg)
    calls = []

    def kill(done, total, rate):
        assert total == whole.rows and 0 < done <= total and rate > 0
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", cfg=cfg, progress=kill)
    again = []
    store = run(tmp_path / "broken", cfg=cfg, progress=lambda done, *_: again.append(done))
    assert content(store) == content(whole) and store.digest == whole.digest
    if stop == 12:
        assert again[0] > calls[3], "began anew instead of at the last committed segment"
    for name, stats in whole.stats.items():
        assert stats.count == store.stats[name].count
        if stats.sum is not None:
            assert (stats.sum == store.stats[name].sum).all()


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import test_harvest
test_harvest.run(sys.argv[2], progress=lambda done, *_: print(done, flush=True))
"""


@pytest.mark.slow
def test_kill_9_of_a_harvest_at_random_moments(tmp_path):
    whole, rng = run(tmp_path / "whole"), np.random.default_rng(0)
    command = [sys.executable, "-c", CHILD, str(pathlib.Path(__file__).parent)]
    for _ in range(6):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(rng.integers(4, 12)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.communicate(timeout=60)
    store = run(tmp_path / "killed")
    store.verify()
    assert content(store) == content(whole) and store.digest == whole.digest


def test_a_deleted_segment_is_written_anew_and_the_rest_kept(tmp_path):
    whole = run(tmp_path)
    before, stats = content(whole), whole.stats
    lost = whole.manifest.segments[1].path
    shutil.rmtree(tmp_path / lost)
    with pytest.raises(StoreError, match=lost):
        Store.open(tmp_path)
    mended = run(tmp_path)
    mended.verify()
    assert content(mended) == before and mended.digest == whole.digest
    assert (mended.stats["early"].sum == stats["early"].sum).all()
    assert [s.path for s in mended.manifest.segments][2:] == [
        s.path for s in whole.manifest.segments
    ][2:]


def test_refuses_a_store_of_another_configuration(tmp_path):
    run(tmp_path)
    for change in (
        {"cfg": dataclasses.replace(CFG, rows=1000)},
        {"seed": 1},
        {"source": Letters(length=50)},
        {"model": Toy(nan_token=7)},
    ):
        with pytest.raises(StoreError, match="another configuration"):
            run(tmp_path, **change)
    assert Store.open(tmp_path).complete
    # the other split's budget is no part of this store
    run(tmp_path, cfg=dataclasses.replace(CFG, heldout_rows=5))


def test_nan_activations_are_refused_by_document_row_and_column(tmp_path):
    with pytest.raises(StoreError, match=r"documents \d+ to \d+: column 'early' has \d+ values"):
        run(tmp_path, model=Toy(nan_token=ord("m")))
    run_rows = run(tmp_path / "fine", model=Toy(nan_token=255)).rows
    assert run_rows > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sites": ("blocks.9.resid_post",)}, "no site 'blocks.9.resid_post'; choose from"),
        ({"sites": ()}, "harvest.sites is empty"),
        ({"cfg": dataclasses.replace(CFG, context=17)}, "made for at most 16"),
        ({"source": Letters(documents_=0)}, "no tokens"),
        ({"split": "test"}, "unknown split"),
    ],
)
def test_bad_input_is_named(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "store", **change)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_bad_sections_are_named():
    for field, value in (("rows", 0), ("batch", 0), ("context", 1), ("segment_rows", -1)):
        with pytest.raises(ValueError, match=field):
            Harvest(**{field: value})


def test_float32_and_a_shorter_context(tmp_path):
    cfg = dataclasses.replace(CFG, dtype="float32", context=8)
    store = run(tmp_path, cfg=cfg, model=Toy(context=8))
    assert store.read("early").dtype == np.float32
    assert store.read("position").max() == 7
    assert store.meta["harvest"]["context"] == 8
