"""The trainer learns, stops and goes on, and scores bytes as it says."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest

from saex.config import load
from saex.data.text import Document, Files, Stdlib, chunk
from saex.models import BOS, PocketLM, Transformer, encode, load_model
from saex.pretrain import Corpus, Pretrain, bits_per_byte, main_config, pretrain
from saex.registry import ConfigError

MODEL = Transformer(d_model=16, n_layers=1, n_heads=2, d_mlp=32, context=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = "def double(x):\n    return x + x\n\n"
    for i in range(30):
        (folder / f"{i}.txt").write_text(text * 3 + f"# {i}\n")
    return Pretrain(
        text=Files(f"{folder}/*.txt"),
        model=MODEL,
        steps=60,
        batch_tokens=256,
        short_context=8,
        warmup_steps=5,
        log_every=5,
        checkpoint_every=20,
        snapshot_every=30,
        evaluate_every=30,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """(final numbers, workdir) of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("run")
    return pretrain(config, workdir), workdir


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_writes_what_it_promises(config, run):
    final, workdir = run
    rows = read_log(workdir)
    heldout = [r for r in rows if "heldout_bits_per_byte" in r]
    assert rows[0]["context"] == 8 and rows[-3]["context"] == 16
    assert [r["step"] for r in heldout] == [30, 60]
    assert final["heldout_bits_per_byte"] < heldout[0]["heldout_bits_per_byte"] < 6
    assert final["heldout_bits_per_byte"] < 4.5  # 8 at the start
    for name in ("step-30", "step-60", "model"):
        model, params = load_model(workdir / f"{name}.safetensors")
        assert model == MODEL
    chunks = list(chunk(config.text.documents("heldout"), encode, 16, BOS))
    assert bits_per_byte(model, params, chunks) == pytest.approx(
        final["heldout_bits_per_byte"], abs=0.01
    )


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(config, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as disk, pytest.raises(OSError):
        disk.setattr("saex.pretrain.save_model", fail)  # first called at step 30
        pretrain(config, tmp_path / "halves")
    pretrain(config, tmp_path / "halves")
    steps = [r["step"] for r in read_log(tmp_path / "halves") if "train_bits" in r]
    assert steps == [5, 10, 15, 20, 25, 30, *range(25, 65, 5)]  # from the checkpoint of step 20
    one, two = (load_model(path)[1] for path in (run[1], tmp_path / "halves"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_batches_are_windows_of_single_documents():
    documents = [Document("a", "a" * 50), Document("b", "bc" * 30), Document("c", "d")]
    corpus = Corpus(documents)
    tokens, lengths = corpus.batch(0, 3, 400, 16)
    assert tokens.shape == (400, 16) and (tokens[:, 0] == BOS).all()
    seen = {bytes(row[1:n].tolist()) for row, n in zip(tokens, lengths)}
    assert seen == {b"a" * 15, b"bc" * 7 + b"b", b"cb" * 7 + b"c", b"d"}
    again, other = corpus.batch(0, 3, 400, 16)[0], corpus.batch(0, 4, 400, 16)[0]
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != other).any()


def test_bits_of_a_model_that_knows_nothing():
    params = MODEL.init(jax.random.key(0))
    chunks = list(chunk([Document("a", "x" * 100)], encode, 16, BOS))
    assert bits_per_byte(MODEL, params, chunks, rows=4) == pytest.approx(math.log2(257), rel=1e-5)


def test_padding_is_not_scored():
    params = MODEL.init(jax.random.key(0))
    params["unembed"] = jax.random.normal(jax.random.key(1), (16, 257))
    (short,) = chunk([Document("a", "xyz")], encode, 16, BOS)
    other = dataclasses.replace(short, tokens=np.where(np.arange(16) < 4, short.tokens, 7))
    bits = bits_per_byte(MODEL, params, [short])
    assert bits == pytest.approx(bits_per_byte(MODEL, params, [other]), rel=1e-6)


def test_a_workdir_of_another_model_is_refused(config, run):
    wider = dataclasses.replace(config, model=dataclasses.replace(MODEL, d_mlp=64))
    with pytest.raises(ValueError, match=r"state\.npz' is of another model: take another"):
        pretrain(wider, run[1])
    assert pretrain(config, run[1]) == run[0]  # and nothing was lost


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"text": {"name": "files", "path": "."}, "model": {"d_model": 16}})
"""


def test_config_files_are_resolved_strictly(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(CONFIG)

    def error_of(*overrides, workdir="run"):
        with pytest.raises(ConfigError) as caught:
            main_config(str(file), overrides, workdir)
        return str(caught.value)

    assert re.search(r"config\.stepz.*steps", error_of(("stepz", "3")))
    assert "config.model" in error_of(("model.n_heads", "3"))
    assert "d_model=16 is no multiple of 2 * n_heads=6" in error_of(("model.n_heads", "3"))
    assert "--workdir=DIR is needed" in error_of(workdir=None)


def test_the_shipped_config_resolves():
    config = load("experiments/pocket_lm.py", (("steps", "7"),), Pretrain)
    assert config.steps == 7 and config.text == Stdlib()
    assert config.model == dataclasses.replace(PocketLM().load()[0], matmul=config.model.matmul)
