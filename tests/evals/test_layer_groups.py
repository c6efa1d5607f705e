"""Angles between layers, and the groups that follow from them."""

import numpy as np
import pytest

from saex.data.manifest import Column
from saex.data.store_writer import StoreWriter
from saex.evals.layer_groups import amad, angular_distances, fewest_groups, groups

ROWS, D = 300, 8


@pytest.fixture
def data():
    """Three layers that turn little, one that turns much; position 0 is an outlier."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, D))
    each = [x]
    for noise in (0.1, 0.1, 2.0):
        each.append(each[-1] + noise * draw.normal(size=(ROWS, D)))
    each = [(3**i * (e + 4 * i)).astype(np.float32) for i, e in enumerate(each)]
    position = np.arange(ROWS, dtype=np.int32) % 10
    each[1][position == 0] = 1e4
    return {f"l{i}": e for i, e in enumerate(each)}, position


@pytest.fixture
def store(data, tmp_path):
    from saex.data.store import Store

    sites, position = data
    columns = {name: Column((D,), "float32") for name in sites} | {"position": Column((), "int32")}
    with StoreWriter(tmp_path / "s", columns, {}, chunk_rows=32) as writer:
        writer.append({**sites, "position": position})
        writer.commit({})
        writer.finish()
    return Store.open(tmp_path / "s")


def test_distances_are_mean_angles_of_centred_rows(store, data):
    sites, position = data
    found = angular_distances(store, list(sites), skip_positions=(0,), batch=64)
    rows = [x[position > 0].astype(np.float64) for x in sites.values()]
    unit = [x - x.mean(0) for x in rows]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    expected = [
        [np.arccos(np.clip((a * b).sum(1), -1, 1)).mean() / np.pi for b in unit] for a in unit
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found, found.T)
    assert not np.diag(found).any() and found.min() >= 0 and found.max() <= 1
    assert fewest_groups(found, 0.1) == [[0, 1, 2], [3]]


def test_complete_linkage():
    """Points on a line: 0, 1, 2.1, 6: joined by their farthest members."""
    at = np.array([0, 1, 2.1, 6.0]) / 10
    D_ = np.abs(at[:, None] - at[None])
    assert groups(D_, 4) == [[0], [1], [2], [3]]
    assert groups(D_, 3) == [[0, 1], [2], [3]]
    assert groups(D_, 2) == [[0, 1, 2], [3]]
    assert groups(D_, 1) == [[0, 1, 2, 3]]
    np.testing.assert_allclose(amad(D_, groups(D_, 2)), (0.21 + 0) / 2)
    assert fewest_groups(D_, 0.11) == [[0, 1, 2], [3]]
    assert fewest_groups(D_, 0.1) == [[0, 1], [2], [3]]


def test_more_groups_are_never_farther_apart():
    x = np.random.default_rng(1).random((9, 3))
    D_ = np.linalg.norm(x[:, None] - x[None], axis=2)
    each = [amad(D_, groups(D_, g)) for g in range(1, 10)]
    assert each[-1] == 0 and (np.diff(each) <= 1e-12).all()


def test_bad_counts_are_refused():
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count={count}"):
            groups(np.zeros((3, 3)), count)
    with pytest.raises(ValueError, match="below=0"):
        fewest_groups(np.zeros((3, 3)), 0.0)
