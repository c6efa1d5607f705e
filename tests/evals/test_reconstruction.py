import jax.numpy as jnp
import numpy as np
import pytest
from eval_cases import Affine, LargestEntries, constant

from saex.data import Column, StoreError
from saex.evals import HeldOut, Reconstruction, Rows, controls
from saex.sae import TopK


def rows_with_mean(rng, count=1000, d=12):
    """Rows far from 0, as residual streams are."""
    return (rng.normal(size=(count, d)) * np.linspace(0.1, 3, d) + 50).astype(np.float32)


@pytest.fixture
def x():
    return rows_with_mean(np.random.default_rng(0))


def heldout(store, **kwargs):
    return HeldOut(Rows(store, "x", **{"batch": 128, **kwargs}))


class InMemory:
    """As much of a store as ``Rows`` needs."""

    def __init__(self, **columns):
        self.columns, self.rows = columns, len(columns["x"])

    def column(self, name, width=None):
        return Column(self.columns[name].shape[1:], str(self.columns[name].dtype))

    def read(self, name, start, stop):
        return self.columns[name][start:stop]


def by_numpy(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    return {
        "fvu": ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": ((x - y) ** 2).mean(),
        "cosine": ((x * y).sum(1) / norms[0] / norms[1]).mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "relative_bias": (y * y).sum() / (x * y).sum(),
    }


def test_predicting_the_mean_scores_one(store_of, x):
    sae, params = constant(x.astype(np.float64).mean(axis=0))
    assert Reconstruction().run(sae, params, heldout(store_of(x=x)))["fvu"] == pytest.approx(
        1, 1e-6
    )


def test_identity_scores_zero(store_of, x):
    out = Reconstruction().run(Affine(12), {"offset": jnp.zeros(12)}, heldout(store_of(x=x)))
    assert out["fvu"] == 0 and out["mse"] == 0
    assert out["cosine"] == pytest.approx(1, abs=1e-6)
    assert out["relative_bias"] == pytest.approx(1, abs=1e-6)


def test_scaled_rows_have_their_factor_as_relative_bias(store_of, x):
    out = Reconstruction().run(Affine(12, 0.7), {"offset": jnp.zeros(12)}, heldout(store_of(x=x)))
    assert out["relative_bias"] == pytest.approx(0.7, 1e-5)
    assert out["l2_ratio"] == pytest.approx(0.7, 1e-5)
    assert out["cosine"] == pytest.approx(1, abs=1e-6)


def test_zero_dictionary_is_finite(store_of, x):
    sae, params = constant(np.zeros(12))
    out = Reconstruction().run(sae, params, heldout(store_of(x=x)))
    assert out["relative_bias"] == 0 and out["cosine"] == 0


@pytest.mark.parametrize("batch", [1, 7, 128, 5000])
def test_equals_numpy_whatever_the_batch(store_of, x, batch):
    y = np.zeros_like(x)
    largest = np.argsort(-np.abs(x), axis=1)[:, :5]
    np.put_along_axis(y, largest, np.take_along_axis(x, largest, axis=1), axis=1)
    x, y = x[:130], y[:130]
    out = Reconstruction().run(LargestEntries(12, 5), {}, heldout(store_of(x=x), batch=batch))
    for name, value in by_numpy(x, y).items():
        assert out[name] == pytest.approx(value, rel=2e-6), name
    assert out["l0"] == 5 and out["rows"] == 130
    assert out["l1"] == pytest.approx(np.abs(y).sum(1).mean(), rel=1e-6)


def test_position_0_costs_only_the_figure_that_has_it(store_of):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 8)).astype(np.float32)
    position = np.tile(np.arange(20, dtype=np.int32), 20)
    x[position == 0] = 100 * np.eye(8, dtype=np.float32)[0]  # large, and easily told
    store = store_of(x=x, position=position)
    out = Reconstruction().run(LargestEntries(8, 3), {}, heldout(store))
    rest = Reconstruction().run(LargestEntries(8, 3), {}, heldout(store, skip_positions=(0,)))
    assert out["fvu_without_first"] == pytest.approx(rest["fvu"], rel=1e-5)
    assert out["fvu"] < 0.1 * rest["fvu"]
    assert rest["rows"] == 380 and rest["fvu"] == rest["fvu_without_first"]


def test_left_out_rows_may_hold_anything(store_of, x):
    tokens = np.arange(1000, dtype=np.int32) % 10
    spoiled = x.copy()
    spoiled[tokens == 3] = np.nan  # no store of ours holds it, another's may
    held = heldout(InMemory(x=spoiled, tokens=tokens), skip_tokens=(3,))
    out = Reconstruction().run(LargestEntries(12, 5), {}, held)
    clean = Reconstruction().run(LargestEntries(12, 5), {}, heldout(store_of(x=x[tokens != 3])))
    assert {k: pytest.approx(v, rel=1e-6) for k, v in clean.items()} == {k: out[k] for k in clean}


def test_a_broken_dictionary_is_an_error(store_of, x):
    sae, params = constant(np.full(12, np.nan))
    with pytest.raises(ValueError, match=r"'x'.*not finite"):
        Reconstruction().run(sae, params, heldout(store_of(x=x)))


def test_constant_rows_have_nothing_to_explain(store_of):
    held = heldout(store_of(x=np.full((50, 4), 3, np.float32)))
    assert Reconstruction().run(Affine(4), {"offset": jnp.zeros(4)}, held)["fvu"] == 0
    assert Reconstruction().run(Affine(4), {"offset": jnp.ones(4)}, held)["fvu"] == 1


def test_wrong_width_and_missing_column_are_named(store_of, x):
    store = store_of(x=x)
    with pytest.raises(StoreError, match=r"'x'.*12.*expected width 7"):
        Reconstruction().run(Affine(7), {"offset": jnp.zeros(7)}, heldout(store))
    with pytest.raises(StoreError, match=r"blocks\.9"):
        Rows(store, "blocks.9")


def test_no_row_left_is_an_error(store_of, x):
    held = heldout(store_of(x=x, tokens=np.zeros(1000, np.int32)), skip_tokens=(0,))
    with pytest.raises(ValueError, match="no held-out row"):
        Reconstruction().run(Affine(12), {"offset": jnp.zeros(12)}, held)


def test_a_subset_is_spread_over_the_store(store_of):
    x = np.repeat(np.arange(100, dtype=np.float32), 10)[:, None]
    rows = Rows(store_of(x=x), "x", batch=10)
    starts = [block.start for block in rows.blocks(200)]
    assert len(starts) == 20 and starts[0] == 0 and starts[-1] == 950


def test_controls_score_as_their_definitions_say(store_of):
    import jax

    rng = np.random.default_rng(2)
    tokens = np.sort(rng.integers(0, 6, 3000)).astype(np.int32)  # the first block is not typical
    x = (rng.normal(size=(6, 10))[tokens] * 3 + rng.normal(size=(3000, 10)) + 20).astype(np.float32)
    train, sae = Rows(store_of(x=x, tokens=tokens), "x", batch=256), TopK(10, 32, 4)
    fitted = controls.fit(train, sae, jax.random.key(0))
    out = Reconstruction().run(sae, fitted["untrained"].params, HeldOut(train, controls=fitted))
    spectrum = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T))[::-1]
    assert out["pca.fvu"] == pytest.approx(spectrum[4:].sum() / spectrum.sum(), rel=1e-4)
    assert out["pca.l0"] == 4
    means = np.stack([x[tokens == t].mean(0) for t in range(6)])[tokens]
    assert out["token_mean.fvu"] == pytest.approx(by_numpy(x, means)["fvu"], rel=1e-4)
    assert out["untrained.fvu"] == out["fvu"]  # the dictionary given is untrained itself


def test_token_mean_gives_the_overall_mean_to_unseen_tokens(store_of):
    import jax

    x = np.random.default_rng(3).normal(size=(60, 4)).astype(np.float32)
    tokens = np.where(np.arange(60) % 2, 5, 1).astype(np.int32)
    train = Rows(store_of(x=x, tokens=tokens), "x", batch=7)
    mean = controls.fit(train, TopK(4, 8, 2), jax.random.key(0))["token_mean"]
    got = mean.reconstruct(x[:4], np.array([3, 99, 5, -1], np.int32))
    np.testing.assert_allclose(got[0], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], got[3])
    np.testing.assert_allclose(got[2], x[tokens == 5].mean(0), rtol=1e-5, atol=1e-6)


def test_controls_need_a_k(store_of, x):
    import jax

    train = Rows(store_of(x=x), "x")
    with pytest.raises(ValueError, match="give fit"):
        controls.fit(train, Affine(12), jax.random.key(0))
