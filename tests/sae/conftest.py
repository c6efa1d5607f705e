"""Which tests of methods wait for ``pytest -m methods``: most of those of most methods."""

import pathlib

import pytest

from saex.sae import SAES

HERE = pathlib.Path(__file__).parent
CORE = {"topk", "relu", "batch_topk", "jump_relu"}  # the others are built of the same functions
GENERAL = ("thresholds", "saved", "gradients", "half")  # files of tests over the whole table
LONG = ("test_loss_falls_and_meshes_agree", "test_gradients_match_finite_differences")


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != HERE:
            continue
        name = item.path.stem.removeprefix("test_")
        if name in GENERAL or (name == "all" and item.originalname in LONG):
            values = getattr(item, "callspec", None)
            values = values.params if values else {}
            name = values.get("name", values.get("sae"))
        if name in set(SAES) - CORE:
            item.add_marker(pytest.mark.methods)
