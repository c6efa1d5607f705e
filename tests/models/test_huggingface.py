"""Models of `transformers`: sites hold what transformers says they hold."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from saex.data import Store
from saex.data.chat import Chat
from saex.data.text import Files
from saex.harvest import Harvest, harvest
from saex.models import MODELS, HuggingFace
from saex.registry import make as make_section
from tests import runs
from tests.models import tiny

pytest.importorskip("torch", reason="torch is not installed (extra 'torch')")
import torch

FOUR = ("gpt2", "pythia", "llama", "gemma2")
BLOCKS = {
    "gpt2": "transformer.h", "pythia": "gpt_neox.layers", "llama": "model.layers",
    "gemma2": "model.layers",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a model by name, saved once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name):
        if name not in made:
            made[name] = tiny.save(root / name, name)
        return str(made[name])

    return get


@pytest.fixture(scope="module")
def load(folder):
    loaded = {}

    def get(name, **fields):
        key = (name, *fields.items())
        if key not in loaded:
            loaded[key] = HuggingFace(folder(name), **{"device": "cpu", **fields}).load()[0]
        return loaded[key]

    return get


def hidden_states(name, tokens):
    with torch.no_grad():
        ids = torch.as_tensor(tokens, dtype=torch.long)
        out = tiny.make(name)(ids, output_hidden_states=True)
    return [x.numpy() for x in out.hidden_states], out.logits.numpy()


@pytest.mark.parametrize("name", FOUR)
def test_sites_equal_the_hidden_states_of_transformers(load, name):
    model, tokens = load(name), tiny.tokens()
    tokens[:, 0], tokens[1, 5] = 0, 0  # an id like others: padding is not known by it
    states, logits = hidden_states(name, tokens)
    friendly = [f"blocks.{i}.resid_post" for i in range(tiny.LAYERS)]
    paths = [f"{BLOCKS[name]}.{i}" for i in range(tiny.LAYERS)]
    ours, acts = model.run({}, tokens, [*friendly, *paths, "blocks.0.resid_pre"])
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(acts["blocks.0.resid_pre"], states[0])
    for i, (one, other) in enumerate(zip(friendly, paths)):
        np.testing.assert_array_equal(acts[one], acts[other])
        assert acts[one].dtype == np.float32 and acts[one].shape == (*tokens.shape, tiny.WIDTH)
        if i + 1 < tiny.LAYERS:  # the last one stands behind the final norm
            np.testing.assert_array_equal(acts[one], states[i + 1])


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_parts_add_up_to_the_residual_stream(load, name):
    model, tokens = load(name), tiny.tokens()
    for i in range(tiny.LAYERS):
        sites = [f"blocks.{i}.{p}" for p in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        before, attn, mlp, after = (model.run({}, tokens, sites)[1][s] for s in sites)
        np.testing.assert_allclose(before + attn + mlp, after, rtol=1e-4, atol=1e-4)
        assert min(np.abs(x).max() for x in (attn, mlp)) > 1e-3
        if i:
            last = model.run({}, tokens, [f"blocks.{i - 1}.resid_post"])[1]
            np.testing.assert_array_equal(before, last[f"blocks.{i - 1}.resid_post"])


@pytest.mark.parametrize("name", FOUR)
def test_mlp_in_is_what_the_mlp_reads(load, name):
    model, tokens = load(name), tiny.tokens()
    _, acts = model.run({}, tokens, ["blocks.1.mlp_in", f"{BLOCKS[name]}.1.mlp"])
    mlp = model.module.get_submodule(f"{BLOCKS[name]}.1.mlp")
    with torch.no_grad():
        out = mlp(torch.as_tensor(acts["blocks.1.mlp_in"])).numpy()
    np.testing.assert_allclose(out, acts[f"{BLOCKS[name]}.1.mlp"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FOUR)
def test_padding_behind_and_other_rows_change_nothing(load, name):
    model, tokens = load(name), tiny.tokens(4, 20)
    lengths, site = [20, 3, 11, 7], "blocks.2.resid_post"
    padded = np.where(np.arange(20) < np.array(lengths)[:, None], tokens, 0)
    _, together = model.run({}, padded, [site], stop_at=site)
    for row, length in enumerate(lengths):
        _, alone = model.run({}, padded[row : row + 1, :length], [site], stop_at=site)
        np.testing.assert_allclose(
            together[site][row, :length], alone[site][0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_documents_of_a_context_are_read_as_if_each_were_alone(load, name):
    model, tokens, site = load(name), tiny.tokens(2, 20), "blocks.2.resid_post"
    parts = [(0, 7), (7, 16)]  # and padding
    positions = np.zeros((2, 20), np.int64)
    for begin, end in parts:
        positions[:, begin:end] = np.arange(end - begin)
    logits, together = model.run({}, tokens, [site], positions=positions)
    for begin, end in parts:
        apart, alone = model.run({}, tokens[:, begin:end], [site])
        np.testing.assert_allclose(logits[:, begin:end], apart, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(together[site][:, begin:end], alone[site], rtol=1e-4, atol=1e-4)
    _, mixed = model.run({}, tokens, [site])
    assert np.abs(mixed[site][:, 7:16] - together[site][:, 7:16]).max() > 1e-3, "the control"


def test_a_model_that_does_not_keep_documents_apart_is_refused(folder, monkeypatch):
    model = HuggingFace(folder("llama"), device="cpu").load()[0]
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda ids, positions=None: forward(ids))
    with pytest.raises(ValueError, match="a document reads the one before it"):
        model.run({}, tiny.tokens(), positions=np.zeros_like(tiny.tokens()))


def test_a_packed_harvest_has_the_rows_of_one_that_is_not(load, tmp_path):
    runs.write_text(tmp_path / "text")
    source, site = Files(str(tmp_path / "text")), "blocks.1.resid_post"
    found = []
    for pack in (False, True):
        cfg = Harvest(
            rows=10**6, context=20, batch=4, pack=pack, dtype="float32", shuffle=False, norms=False
        )
        store = harvest(load("llama"), {}, source, "train", tmp_path / str(pack), cfg, sites=[site])
        names = ("document", "position", "tokens", site)
        rows = np.column_stack([store.read(name) for name in names])
        found.append(sorted(map(tuple, rows[:, :3].tolist())))
        sums = np.sort(rows[:, 3:].astype(np.float64).sum(axis=1))
        found.append(sums)
    assert found[0] == found[2] and len(found[0]) > 500
    np.testing.assert_allclose(found[1], found[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FOUR)
def test_nothing_behind_the_last_site_is_computed(load, name):
    model, tokens, seen = load(name), tiny.tokens(), []
    last = model.module.get_submodule(f"{BLOCKS[name]}.2")
    with last.register_forward_pre_hook(lambda *_: seen.append(1)):
        sites = ["blocks.0.attn_out", "blocks.1.resid_post", f"{BLOCKS[name]}.1.mlp"]
        logits, acts = model.run({}, tokens, sites, stop_at="blocks.1.resid_post")
        assert logits is None and set(acts) == set(sites) and not seen
        _, whole = model.run({}, tokens, sites)
        assert seen
    for site in sites:
        np.testing.assert_array_equal(acts[site], whole[site])
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.module.modules()]
    assert not any(hooks), "hooks of a pass stay"


def test_sites_are_in_the_order_of_computation(load):
    for name in FOUR:
        sites, layers = list(load(name).sites), BLOCKS[name]
        order = [
            "blocks.0.resid_pre", "blocks.0.attn_out", "blocks.0.mlp_in", f"{layers}.0.mlp",
            "blocks.0.resid_post", "blocks.1.resid_pre", f"{layers}.1.mlp", f"{layers}.2",
            sites[-1],
        ]  # fmt: skip
        places = [sites.index(s) for s in order]
        assert places == sorted(places), order
        widths = load(name).sites
        assert {widths[s] for s in order[:-1]} == {tiny.WIDTH} and widths[sites[-1]] == tiny.VOCAB
        assert not [s for s in sites if "rotary" in s], "what is no vector a token is no site"
    assert load("llama").sites["model.layers.0.mlp.up_proj"] == 24


def test_what_cannot_be_done_is_said(load):
    model, tokens = load("llama"), tiny.tokens()
    with pytest.raises(NotImplementedError, match=r"edit of blocks.0.resid_post: .* is read"):
        model.run({}, tokens, edits={"blocks.0.resid_post": None})
    with pytest.raises(KeyError, match=r"psot' in .* has blocks.0.resid_post, .* there are \d+"):
        model.run({}, tokens, ["blocks.0.resid_psot"])
    with pytest.raises(ValueError, match=r"'blocks.1.mlp_out' comes after"):
        model.run({}, tokens, ["blocks.1.mlp_out"], stop_at="blocks.0.resid_post")
    with pytest.raises(ValueError, match=r"token ids from -1 to \d+: .* has 300"):
        model.run({}, tokens - tokens.min() - 1)
    with pytest.raises(ValueError, match=r"33 tokens: .* has 32 positions"):
        model.run({}, tiny.tokens(1, 33))


def test_half_precision_and_context(load):
    tokens, site = tiny.tokens(), "blocks.2.resid_post"
    exact = load("llama").run({}, tokens, [site])[1][site]
    half = load("llama", dtype="bfloat16").run({}, tokens, [site])[1][site]
    assert half.dtype == np.float32 and not np.array_equal(half, exact)
    assert np.linalg.norm(half - exact) < 0.05 * np.linalg.norm(exact)
    assert load("llama").context == tiny.CONTEXT and load("llama", context=8).context == 8


def test_the_tokenizer_of_the_folder(load, folder, tmp_path):
    tokenizer = load("llama").tokenizer
    ids = tokenizer.encode("def naïve(self): <s>\n")
    assert ids.dtype == np.int32 and tokenizer.loaded.decode(ids) == "def naïve(self): <s>\n"
    assert tokenizer.bos == 0 and ids[0] != 0
    shown = [tokenizer.token_text(int(i)) for i in ids]
    assert shown[:1] == ["def"] and " " not in shown[0] and shown[-1] == "\n"
    assert tokenizer.token_text(10**6) == "<1000000>"
    tiny.save(tmp_path / "no_bos", bos=False)
    model = HuggingFace(str(tmp_path / "no_bos")).load()[0]
    with pytest.raises(ValueError, match=r"has no BOS token: name .* config.subject.bos"):
        _ = model.tokenizer.bos
    named = HuggingFace(str(tmp_path / "no_bos"), bos="</s>").load()[0]
    assert named.tokenizer.bos == 1
    with pytest.raises(ValueError, match=r"bos='def return' is \d+ tokens"):
        _ = HuggingFace(folder("llama"), bos="def return").load()[0].tokenizer.bos


def test_a_store_knows_weights_and_tokenizer(load, folder, tmp_path):
    one = load("llama").describe()
    assert one == HuggingFace(folder("llama")).load()[0].describe()
    assert json.loads(json.dumps(one)) == one and one["architecture"] == "LlamaForCausalLM"
    assert load("llama", dtype="bfloat16").describe()["weights_sha256"] != one["weights_sha256"]
    shutil.copytree(folder("llama"), tmp_path / "copy")
    tiny.tokenizer(template="{{ messages }}").save_pretrained(tmp_path / "copy")
    other = HuggingFace(str(tmp_path / "copy")).load()[0].describe()
    assert other["tokenizer"] != one["tokenizer"]
    assert other["weights_sha256"] == one["weights_sha256"]


# ----------------------------------------------------------------------------- folders of strangers


def test_folders_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' has no config.json"):
        HuggingFace(str(empty)).load()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone'"):
        HuggingFace(str(tmp_path / "gone")).load()
    with pytest.raises(FileNotFoundError, match=r"'saex/gone' is no folder .* on the hub"):
        _ = HuggingFace("saex/gone").load()[0].sites
    bare = tmp_path / "bare"
    tiny.make("llama").save_pretrained(bare)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer can be read from .*bare"):
        HuggingFace(str(bare)).load()[0].tokenizer.encode("a")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file: saex opens no pickled"):
        HuggingFace(str(bare)).load()


def test_no_code_of_a_folder_is_executed(folder, tmp_path):
    stranger = tmp_path / "stranger"
    shutil.copytree(folder("llama"), stranger)
    (stranger / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((stranger / "config.json").read_text())
    config |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    }
    (stranger / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"brings code of its own, and saex executes no code"):
        _ = HuggingFace(str(stranger)).load()[0].sites
    assert not (tmp_path / "ran").exists()


def test_without_torch(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else real(name)
    )
    with pytest.raises(ImportError, match=r"needs torch: pip install 'saex\[torch\]'"):
        HuggingFace("anywhere").load()


def test_it_is_a_config_section():
    section = make_section(MODELS, {"name": "huggingface", "path": "a", "dtype": "bfloat16"})
    assert section == HuggingFace("a", "bfloat16")
    with pytest.raises(ValueError, match="dtype='int8'"):
        make_section(MODELS, {"name": "huggingface", "path": "a", "dtype": "int8"})
    with pytest.raises(ValueError, match="context=1"):
        HuggingFace("a", context=1)
    assert jax.tree.leaves(HuggingFace("a")) == [HuggingFace("a")]


# ------------------------------------------------------------------------------------- a whole run


def write_config(folder, model, **changes):
    mapping = runs.mapping(
        folder, subject={"name": "huggingface", "path": model, "device": "cpu"},
        site="blocks.1.resid_post", steps=4, checkpoint={"every": 4},
        harvest={"rows": 1500, "heldout_rows": 600, "batch": 4, "segment_rows": 512},
        **changes,
    )  # fmt: skip
    path = folder / "config.py"
    text = f"from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({mapping!r})\n"
    path.write_text(text)
    return path


def test_a_whole_run_ends_well_and_says_what_it_left_out(folder, load, tmp_path):
    runs.write_text(tmp_path / "text")
    config = write_config(tmp_path, folder("gemma2"), report={"enabled": True, "latents": 4})
    command = [sys.executable, "-m", "saex.cli", "train", f"--config={config}"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "No cross-entropy (CE increase, loss recovered, KL)" in done.stderr
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {"fvu", "l0", "dead_fraction"} <= set(result) and "ce_clean" not in result
    assert (tmp_path / "run" / "DONE.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No cross-entropy" in page
    words = re.sub(r"<[^>]+>", "", page)
    assert "return·" in words or "·return" in words, "tokens are not shown as text"

    store = Store.open(tmp_path / "run" / "store" / "train")
    said = [str(store.path), f"--tokenizer={folder('gemma2')}", "--rows=3", "--json"]
    command = [sys.executable, "-m", "saex.cli", "store", "head", *said]
    head = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert head.returncode == 0, head.stderr
    texts = [load("gemma2").tokenizer.decode([token]) for token in store.read("tokens", 0, 3)]
    assert [row["text"] for row in json.loads(head.stdout)] == texts
    model, rows = load("gemma2"), store.read("tokens")
    assert store.meta["model"]["architecture"] == "Gemma2ForCausalLM"
    at = np.flatnonzero(store.read("position") == 0)
    assert len(at) > 10 and (rows[at] == 0).all(), "contexts begin with BOS"
    _, acts = model.run({}, np.zeros((1, 1), np.int32), ["blocks.1.resid_post"])
    expected = acts["blocks.1.resid_post"][0, 0].astype(
        store.columns["blocks.1.resid_post"].numpy_dtype
    )
    assert (store.read("blocks.1.resid_post")[at] == expected).mean() > 0.99


def test_conversations_are_read_each_by_itself(load, tmp_path):
    rows = [
        {"messages": [
            {"role": "user", "content": f"for {i}" * (1 + i % 3)},
            {"role": "assistant", "content": "return " * (i % 2)},
        ]}
        for i in range(30)
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, site = load("llama"), "model.layers.1.mlp"
    cfg = Harvest(batch=4, dtype="float32", chunk_rows=64, shuffle=False)
    source = Chat(str(tmp_path / "t.jsonl"))
    store = harvest(model, {}, source, "train", tmp_path / "store", cfg, sites=[site])
    starts = np.append(np.flatnonzero(store.read("position") == 0), store.rows)
    assert len(starts) > 20 and len(set(store.read("document"))) == len(starts) - 1
    for start, stop in itertools.pairwise(starts.tolist()):
        tokens = store.read("tokens", start, stop)
        _, acts = model.run({}, tokens[None], [site], stop_at=site)
        np.testing.assert_allclose(
            store.read(site, start, stop), acts[site][0], rtol=1e-4, atol=1e-5
        )
        text = model.tokenizer.decode(tokens)
        assert text.startswith("<s><|im_start|>user\nfor ")
    answers = model.tokenizer.decode(store.read("tokens")[store.read("role") == 3])
    assert set(answers) == set("return")
