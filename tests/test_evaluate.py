"""What a run is judged on: the rows that it counts, by the numbers of its training store."""

import json

import numpy as np
import pytest

from saex import load_sae, loop
from saex.data import Column, StoreWriter
from saex.data.mixed import open_mixed
from saex.data.split import open_split
from saex.evals import Rows
from saex.evaluate import norm_limits, site_rows
from tests import runs

WIDTH, MOST = 16, 3.0
COLUMNS = {"x": Column((WIDTH,), "float32"), "x.norm": Column((), "float32")}
MINE = {"site": "x", "subject": None, "stream__batch": 64, "stream__max_norm": MOST}


def write(path, rows, scale, seed):
    """Rows of which each tenth is ten times as long."""
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal((rows, WIDTH)) * np.where(np.arange(rows) % 10, 1, 10)[:, None]
    x = x.astype(np.float32)
    with StoreWriter(path, COLUMNS, chunk_rows=64) as writer:
        writer.append({"x": x, "x.norm": np.linalg.norm(x, axis=1)})
        writer.finish()
    return x


def within(x, train):
    """The rows whose norm is no more than so many medians of the training rows'."""
    limit = MOST * np.median(np.linalg.norm(train, axis=1))
    return x[np.linalg.norm(x, axis=1) <= limit]


def fvu(x, y):
    return np.square(x - y).sum(dtype=float) / np.square(x - x.mean(0)).sum(dtype=float)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Held-out rows are of another scale, so their own median would be another limit."""
    folder = tmp_path_factory.mktemp("evaluate")
    train = write(folder / "store" / "train", 2000, 1.0, seed=0)
    return folder, train, write(folder / "store" / "heldout", 700, 2.6, seed=1)


def test_rows_beyond_the_norm_of_the_stream_are_not_judged_either(stores, caplog):
    folder, train, heldout = stores
    config = runs.config(folder, store=str(folder / "store"), **MINE, eval__controls=True)
    with caplog.at_level("INFO", "saex"):
        result = loop.train(config, folder / "run")
    kept = within(heldout, train)
    assert len(within(heldout, heldout)) > len(kept) > 300, "the limits must differ"
    sae, params = load_sae(folder / "run")
    y = np.asarray(sae.decode(params, sae.encode(params, kept)))
    assert result["rows"] == len(kept)
    assert result["fvu"] == pytest.approx(fvu(kept, y), rel=1e-4)
    x = within(train, train).astype(float)  # of which the controls are made
    directions = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][: sae.k]
    projected = x.mean(0) + (kept - x.mean(0)) @ directions.T @ directions
    assert result["pca.fvu"] == pytest.approx(fvu(kept, projected), rel=1e-4)
    limit = MOST * np.median(np.linalg.norm(train, axis=1))
    assert f"Left out: position 0; x.norm above {limit:.4g}." in caplog.text
    assert json.loads((folder / "run" / "eval.json").read_text())["fvu"] == result["fvu"]


def test_of_stores_that_are_mixed_each_has_a_limit_of_its_own(stores):
    folder, train, heldout = stores
    small = write(folder / "small" / "train", 500, 0.1, seed=2)
    unseen = write(folder / "small" / "heldout", 300, 0.1, seed=3)
    mix = {"stores": [{"path": "store", "weight": 1}, {"path": "small", "weight": 1}]}
    (folder / "mix.json").write_text(json.dumps(mix))
    config = runs.config(folder, store=str(folder / "mix.json"), **MINE)
    limits = norm_limits(config, open_mixed(folder / "mix.json", "train"))
    rows = site_rows(config, open_mixed(folder / "mix.json", "heldout"), None, limits)
    got = np.concatenate([block.x[block.kept] for block in rows.blocks()])
    assert (got == np.concatenate([within(heldout, train), within(unseen, small)])).all()


def test_without_a_limit_norms_are_not_asked_for(stores):
    folder, _, heldout = stores
    config = runs.config(folder, store=str(folder / "store"), **{**MINE, "stream__max_norm": 0.0})
    assert norm_limits(config, None) == {}
    rows = site_rows(config, open_split(folder / "store", "heldout"))
    assert isinstance(rows, Rows) and not rows.skips_more
    assert sum(int(block.kept.sum()) for block in rows.blocks()) == len(heldout)
