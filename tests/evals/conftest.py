"""Stores in a temporary folder, and a transformer with held-out text."""

import numpy as np
import pytest
from eval_cases import SITE, harvested, random_model, write_store

from saex.evals import Contexts, HeldOut, Rows


@pytest.fixture
def store_of(tmp_path):
    """Make a store: ``store_of(x=..., tokens=...)``."""
    count = iter(range(100))
    return lambda **columns: write_store(tmp_path / f"store{next(count)}", **columns)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """HeldOut over a random transformer and 21 contexts, some of them short."""
    rng = np.random.default_rng(0)
    model, params = random_model()
    tokens = rng.integers(0, 18, (21, 12)).astype(np.int32)
    tokens[:, 0] = 18
    lengths = np.where(np.arange(21) % 4 == 3, 5, 12).astype(np.int32)
    contexts = Contexts(tokens, lengths)
    store = harvested(model, params, contexts, tmp_path_factory.mktemp("lm"))
    return HeldOut(Rows(store, SITE, batch=64), model, params, contexts)
