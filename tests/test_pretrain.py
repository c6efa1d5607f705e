"""The trainer learns, stops and goes on, and scores bytes as it says."""

import dataclasses
import json
import math

import jax
import ml_collections
import numpy as np
import pytest

from saex.data.text import Document, Files, chunk
from saex.models import BOS, Transformer, encode, load_model
from saex.pretrain import Corpus, Pretrain, bits_per_byte, main_config, pretrain

MODEL = Transformer(d_model=16, n_layers=1, n_heads=2, d_mlp=32, context=16)


@pytest.fixture
def config(tmp_path):
    text = "def double(x):\n    return x + x\n\n"
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(text * 3 + f"# {i}\n")
    return Pretrain(
        text=Files(f"{tmp_path}/*.txt"),
        model=MODEL,
        steps=60,
        batch_tokens=512,
        short_context=8,
        warmup_steps=5,
        log_every=5,
        checkpoint_every=20,
        snapshot_every=30,
        evaluate_every=30,
    )


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_writes_what_it_promises(config, tmp_path):
    final = pretrain(config, tmp_path / "run")
    rows = read_log(tmp_path / "run")
    heldout = [r for r in rows if "heldout_bits_per_byte" in r]
    assert rows[0]["context"] == 8 and rows[-3]["context"] == 16
    assert [r["step"] for r in heldout] == [30, 60]
    assert final["heldout_bits_per_byte"] < heldout[0]["heldout_bits_per_byte"] < 6
    assert final["heldout_bits_per_byte"] < 4.5  # 8 at the start
    for name in ("step-30", "step-60", "model"):
        model, params = load_model(tmp_path / "run" / f"{name}.safetensors")
        assert model == MODEL
    chunks = list(chunk(config.text.documents("heldout"), encode, 16, BOS))
    assert bits_per_byte(model, params, chunks) == pytest.approx(
        final["heldout_bits_per_byte"], abs=0.01
    )


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(config, tmp_path, monkeypatch):
    pretrain(config, tmp_path / "whole")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as disk, pytest.raises(OSError):
        disk.setattr("saex.pretrain.save_model", fail)  # first called at step 30
        pretrain(config, tmp_path / "halves")
    pretrain(config, tmp_path / "halves")
    steps = [r["step"] for r in read_log(tmp_path / "halves") if "train_bits" in r]
    assert steps == [5, 10, 15, 20, 25, 30, *range(25, 65, 5)]  # from the checkpoint of step 20
    one, two = (load_model(tmp_path / name)[1] for name in ("whole", "halves"))
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


def test_configs_are_resolved_strictly(config, tmp_path):
    section = ml_collections.ConfigDict(
        {"text": {"name": "files", "path": config.text.path}, "model": {"d_model": 16}}
    )
    section.stepz = 3
    with pytest.raises(ValueError, match=r"config\.stepz.*steps"):
        main_config(section, tmp_path / "run")
    del section.stepz
    section.model.n_heads = 3
    with pytest.raises(ValueError, match=r"config\.model.*d_model=16 is no multiple"):
        main_config(section, tmp_path / "run")
