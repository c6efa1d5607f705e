"""Trained transformers on disk: what is written comes back, what is torn is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from saex.models import MODELS, PocketLM, Trained, Transformer, load_model, save_model
from saex.registry import make

SMALL = Transformer(d_model=8, n_layers=1, n_heads=2, d_mlp=16, context=8)


@pytest.fixture
def saved(tmp_path):
    params = SMALL.init(jax.random.key(0))
    save_model(tmp_path / "model.safetensors", SMALL, params, {"step": 3})
    return tmp_path / "model.safetensors", params


def test_weights_come_back_as_fp32_to_half_precision(saved):
    path, params = saved
    model, back = load_model(path)
    assert model == SMALL
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(back)):
        assert y.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(x).astype(np.float16), y)


def test_a_folder_stands_for_its_final_weights(saved):
    path, _ = saved
    model, params = Trained(str(path.parent), matmul="float32").load()
    assert model == SMALL
    assert Trained(str(path)).load()[0] == dataclasses.replace(SMALL, matmul="bfloat16")
    logits, _ = model.run(params, np.zeros((1, 8), np.int32))
    assert logits.shape == (1, 8, 257)


def test_files_that_cannot_be_used_are_named(saved, tmp_path):
    path, _ = saved
    with pytest.raises(FileNotFoundError, match=r"no weights at '.*gone'"):
        load_model(tmp_path / "gone")
    whole = path.read_bytes()
    for size in (len(whole) - 10, 40, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors' is no complete safetensors"):
            load_model(path)
    arrays = safetensors.numpy.load(whole)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match="names no model in its metadata"):
        load_model(path)
    safetensors.numpy.save_file(arrays, path, {"model": json.dumps({"depth": 3})})
    with pytest.raises(ValueError, match=r"bad hyper-parameters.*depth"):
        load_model(path)
    wide = json.dumps(dataclasses.asdict(dataclasses.replace(SMALL, d_model=16)))
    safetensors.numpy.save_file(arrays, path, {"model": wide})
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.k' is \(8, 8\), expected \(16, 16\)"):
        load_model(path)


def test_models_are_config_sections():
    assert make(MODELS, {"name": "pocket-lm"}) == PocketLM()
    with pytest.raises(ValueError, match=r"config\.model\.matmul='int8'"):
        make(MODELS, {"name": "pocket-lm", "matmul": "int8"}, "config.model")
