"""Models side by side: each as it is alone, its sites under its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.models import Edit, Models, Several, Transformer, save_model

FIRST = Transformer(d_model=8, n_layers=1, n_heads=2, d_mlp=16, context=8)
SECOND = Transformer(d_model=16, n_layers=2, n_heads=2, d_mlp=16, context=6)
BOTH = Several((("first", FIRST), ("second", SECOND)))
TOKENS = np.arange(10, dtype=np.int32).reshape(2, 5)


@pytest.fixture
def params():
    made = {"first": FIRST.init(jax.random.key(0)), "second": SECOND.init(jax.random.key(1))}
    return jax.tree.map(lambda x: x + 0.01, made)  # nothing is zero


def test_sites_and_activations_are_those_of_each_alone(params):
    site = {"first": "blocks.0.resid_post", "second": "blocks.1.mlp_out"}
    taps = [f"{name}.{own}" for name, own in site.items()]
    logits, acts = BOTH.run(params, TOKENS, taps)
    assert BOTH.context == 6 and [BOTH.sites[t] for t in taps] == [8, 16]
    for name, model in BOTH.models:
        alone, own = model.run(params[name], TOKENS, [site[name]])
        np.testing.assert_array_equal(acts[f"{name}.{site[name]}"], own[site[name]])
    np.testing.assert_array_equal(logits, alone)  # the last one's


def test_an_edit_reaches_its_own_model_alone(params):
    taps = ["first.blocks.0.resid_post", "second.blocks.1.resid_post"]
    _, plain = BOTH.run(params, TOKENS, taps)
    edit = {"second.blocks.0.resid_pre": Edit(jnp.multiply, (3.0,))}
    _, edited = BOTH.run(params, TOKENS, taps, edit)
    np.testing.assert_array_equal(edited[taps[0]], plain[taps[0]])
    assert not np.allclose(edited[taps[1]], plain[taps[1]])


def test_nothing_is_computed_after_the_last_site_wanted(params):
    last = "first.blocks.0.mlp_in"
    logits, acts = BOTH.run({"first": params["first"]}, TOKENS, [last], stop_at=last)
    assert logits is None and list(acts) == [last]


def test_wrong_names_are_said(params):
    with pytest.raises(KeyError, match=r"no site 'third\.blocks\.0\.resid_post'.*first\.blocks"):
        BOTH.run(params, TOKENS, ["third.blocks.0.resid_post"])
    for names in ((), ("a", "a"), ("a.b",)):
        with pytest.raises(ValueError, match="without dots"):
            Several(tuple((name, FIRST) for name in names))


def test_each_keeps_the_documents_of_a_context_apart(params):
    positions = np.concatenate([np.arange(4), np.arange(TOKENS.shape[1] - 4)])
    positions = np.tile(positions, (len(TOKENS), 1))
    sites = ["first.blocks.0.resid_post", "second.blocks.0.resid_post"]
    _, packed = BOTH.run(params, TOKENS, sites, positions=positions)
    _, alone = BOTH.run(params, TOKENS[:, 4:], sites)
    _, seen = BOTH.run(params, TOKENS, sites)
    for site in sites:
        np.testing.assert_allclose(packed[site][:, 4:], alone[site], atol=1e-5)
        assert float(np.abs(packed[site] - seen[site]).max()) > 1e-3


def test_a_section_of_the_configuration_loads_them(params, tmp_path):
    save_model(tmp_path / "early.safetensors", FIRST, params["first"], {})
    paths = {"early": str(tmp_path / "early.safetensors"), "late": "pocket-lm"}
    model, loaded = Models(paths, matmul="float32").load()
    assert model.sites["early.blocks.0.mlp_in"] == 8 and model.sites["late.blocks.3.mlp_in"] == 256
    assert list(loaded) == ["early", "late"]
    assert model.describe()["early"]["d_model"] == 8
    with pytest.raises(FileNotFoundError, match="gone"):
        Models({"early": str(tmp_path / "gone")}).load()
