"""Whole runs of methods that read more than one site's rows: harvested, trained, evaluated."""

import jax
import numpy as np
import pytest

from saex import live, load_sae, loop
from saex.contexts import make_forward
from saex.data.store import Store
from saex.loop import train
from saex.models import Transformer, load_model, save_model
from saex.registry import ConfigError
from tests import runs

A, B = "blocks.0.resid_post", "blocks.0.mlp_in"
SAE = {"d_in": 16, "n": 64, "k": 4, "dead_after_tokens": 200}
CASES = {
    "skip_transcoder": {"site": A, "columns": {"y": B}, "sae": {**SAE, "d_out": 16}},
    "crosscoder": {"site": f"{A}+{B}", "sae": {"d_in": 32, "n": 64, "widths": (16, 16)}},
    "gradient_topk": {"site": A, "columns": {"gradient": A + ".gradient"}, "sae": SAE},
    "multi_layer": {"site": f"{A}+{B}", "sae": {**SAE, "sites": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs.write_text(folder / "text", files=12)
    runs.write_model(folder / "model.safetensors")
    return folder


def settings(folder, name, **changes):
    case = {"eval__controls": True, "harvest__rows": 1500, "steps": 6, **CASES[name], **changes}
    config = runs.mapping(folder, **case)
    return runs.resolve({**config, "sae": {"name": name, **case["sae"]}})


SLOW = ("crosscoder", "skip_transcoder")  # the others show as much
EACH = [
    pytest.param(n, marks=pytest.mark.slow if n in SLOW else pytest.mark.methods)
    for n in sorted(CASES)
]


@pytest.mark.parametrize("name", EACH)
def test_a_run_from_text_to_evaluation(folder, name):
    config, path = settings(folder, name), folder / name
    result = train(config, path)
    assert np.isfinite(result["fvu"]) and result["step"] == 6
    sae, params = load_sae(path)
    store = Store.open(path / "store" / "heldout")
    x = np.concatenate([store.read(part, 0, 8) for part in config.site.split("+")], axis=1)
    x = x[:, : sae.d_in]
    codes = sae.encode(params, x)
    assert np.asarray(sae.decode(params, codes, x)).shape == (8, sae.d_out)
    if name == "multi_layer":
        fvus = [result[f"{site}.fvu"] for site in (A, B)]
        np.testing.assert_allclose(result["fvu"], np.mean(fvus))
        assert fvus[0] != fvus[1] and np.isfinite(result[f"{B}.pca.fvu"])
    if name == "gradient_topk":
        assert A + ".gradient" in store.columns and "untrained.fvu" not in result


@pytest.mark.methods
def test_a_live_crosscoder_gets_all_its_sites_from_one_pass(folder, monkeypatch):
    passes = []

    def noted(model, cfg):
        forward = make_forward(model, cfg)

        def call(params, *inputs):
            passes.append((np.asarray(inputs[0]).tobytes(), cfg.sites))
            return forward(params, *inputs)

        return call

    monkeypatch.setattr(live, "make_forward", noted)
    monkeypatch.setattr(loop, "evaluate_run", lambda folder: {})
    changes = {"live__enabled": True, "harvest__rows": 4000, "stream__window": 2}
    train(settings(folder, "crosscoder", **changes), folder / "live")
    both, alone = list(passes), folder / "live_alone"
    passes.clear()
    train(settings(folder, "multi_layer", site=A, sae={**SAE, "sites": 1}, **changes), alone)
    assert {sites for _, sites in both} == {(A, B)} and {sites for _, sites in passes} == {(A,)}
    assert sorted(t for t, _ in both) == sorted(t for t, _ in passes), "a pass for each site"
    sae, params = load_sae(folder / "live")
    assert sae.widths == (16, 16) and all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_wrong_widths_are_told_before_anything_is_harvested(folder):
    for name, sae, message in (
        ("multi_layer", {**SAE, "sites": 3}, "for each of config.sae.sites=3.* has width 32"),
        ("crosscoder", {"d_in": 16, "n": 64}, "config.sae.d_in=16, but .* has width 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(settings(folder, name, sae=sae), folder / "wrong" / name)


@pytest.mark.methods
def test_a_crosscoder_of_two_models_reads_rows_of_the_same_tokens(folder):
    late, params = load_model(folder / "model.safetensors")
    early = Transformer(d_model=16, n_layers=1, n_heads=2, d_mlp=32, context=32)
    save_model(folder / "early.safetensors", early, early.init(jax.random.key(5)), {})
    paths = {"early": folder / "early.safetensors", "late": folder / "model.safetensors"}
    paths = {name: str(path) for name, path in paths.items()}
    site = f"early.{A}+late.{A}"
    config = runs.resolve(
        runs.mapping(folder, sae=CASES["crosscoder"]["sae"] | {"name": "crosscoder"}, site=site)
        | {"subject": {"name": "several", "paths": paths}, "steps": 6}
    )
    result = train(config, folder / "two")
    store = Store.open(folder / "two" / "store" / "heldout")
    tokens, position = (store.read(name, 0, 32) for name in ("tokens", "position"))
    assert position.tolist() == list(range(32)) and np.isfinite(result["fvu"])
    _, acts = late.run(params, tokens[None], [A])
    stored = store.read(f"late.{A}", 0, 32).astype(np.float32)
    np.testing.assert_allclose(stored, acts[A][0], rtol=0.02, atol=0.02)
