"""What methods say of their columns' widths, and what a run says of columns of other widths."""

import numpy as np
import pytest

from saex.data import Column, StoreWriter
from saex.loop import train
from saex.registry import ConfigError
from saex.sae import SAES
from saex.sae.base import column_widths
from tests import runs
from tests.sae import toy
from tests.sae.small import small

WRONG = {  # method, columns of the store beside x, what is said
    "y": ("skip_transcoder", {"y": (24,)}, r"'y', has width 24, and 8 .*sae\.d_out=24"),
    "gradient": ("gradient_topk", {"gradient": (8,)}, r"has width 8, and 16 .*config\.site='x'"),
    "labels": (
        "guided",
        {"label": (3,)},
        r"width 3, and 2 was expected: set config.sae.concepts=3",
    ),
    "label": ("guided", {"label": ()}, r"has width 1, and 2 was expected"),
    "complexity": ("adaptive_k", {"complexity": (2,)}, r"has width 2, and 1 .*config\.columns"),
}
OWN = {
    "skip_transcoder": {"d_out": 8, "k": 4},
    "gradient_topk": {"k": 4},
    "guided": {"k": 4, "concepts": 2},
    "adaptive_k": {"k_min": 1, "k_max": 4},
}


@pytest.mark.parametrize("name", sorted(SAES))
def test_widths_are_those_of_a_batch_that_can_be_trained_on(name):
    sae = small(name)
    made = toy.columns(sae, np.ones((2, sae.d_in), np.float32), 0)
    assert column_widths(sae) == {key: a[0].size for key, a in made.items()}


@pytest.mark.parametrize("case", WRONG)
def test_a_column_of_another_width_is_told_before_training(tmp_path, case):
    name, columns, message = WRONG[case]
    shapes = {"x": (16,), **columns}
    described = {key: Column(shape, "float32") for key, shape in shapes.items()}
    with StoreWriter(tmp_path / "rows", described) as writer:
        writer.append({key: np.ones((256, *shape), np.float32) for key, shape in shapes.items()})
        writer.commit({})
        writer.finish()
    sae = {"name": name, "d_in": 16, "n": 32, **OWN[name]}
    given = {"subject": None, "store": str(tmp_path / "rows"), "site": "x", "sae": sae}
    with pytest.raises(ConfigError, match=message):
        train(runs.resolve({**runs.mapping(tmp_path), **given}), tmp_path / "run")


def test_a_site_of_another_width_is_told_before_anything_is_harvested(tmp_path):
    runs.write_text(tmp_path / "text", files=2)
    runs.write_model(tmp_path / "model.safetensors")
    sae = {"name": "transcoder", "d_in": 16, "d_out": 32, "n": 32}
    given = {"sae": sae, "columns": {"y": "blocks.0.mlp_out"}}
    config = runs.resolve({**runs.mapping(tmp_path), **given})
    with pytest.raises(ConfigError, match=r"'blocks\.0\.mlp_out'.* has width 16, and 32"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "store").exists()
