import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_cases import Affine, LargestEntries

from saex.evals import Density, HeldOut, Reconstruction, Rows, count, evaluate, histogram
from saex.sae import ReLU, TopK


def test_counts_are_those_of_the_rows_that_count(store_of):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 10)).astype(np.float32) * np.linspace(0, 2, 10, dtype=np.float32)
    position = (np.arange(500) % 25).astype(np.int32)
    rows = Rows(store_of(x=x, position=position), "x", skip_positions=(0,), batch=64)
    counts = count(LargestEntries(10, 3), {}, rows)
    kept = x[position != 0]
    top = np.argsort(-np.abs(kept), axis=1)[:, :3]
    np.testing.assert_array_equal(counts.fired, np.bincount(top.reshape(-1), minlength=10))
    assert counts.rows == 480 and counts.fired[0] == 0
    out = Density().run(LargestEntries(10, 3), {}, HeldOut(rows))
    assert out["dead_fraction"] == np.mean(counts.fired == 0)
    assert out["dense_fraction"] == np.mean(counts.fired / 480 > 0.1)
    assert out["density_rows"] == 480


@pytest.mark.parametrize("sae", [TopK(8, 32, 4), ReLU(8, 32)])
def test_densities_add_up_to_l0(store_of, sae):
    x = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    rows = Rows(store_of(x=x), "x", batch=64)
    params, _ = sae.init(jax.random.key(0), {"x": jnp.asarray(x)})
    l0 = Reconstruction().run(sae, params, HeldOut(rows))["l0"]
    assert count(sae, params, rows).density.sum() == pytest.approx(l0, rel=1e-12)


def test_signed_codes_fire_too(store_of):
    x = -np.ones((10, 3), np.float32)
    assert count(Affine(3), {"offset": 0}, Rows(store_of(x=x), "x")).fired.tolist() == [10, 10, 10]


def test_histogram_holds_every_latent_once(store_of):
    from saex.evals import Counts

    fired = np.array([0, 0, 1, 10, 99, 100, 1000, 1000])
    h = histogram(Counts(fired, 1000))
    assert h.dead == 2 and h.counts.sum() == 6
    assert h.edges[0] == -3 and h.edges[-1] == 0
    assert h.counts[-1] == 2 and h.counts[0] == 1


@pytest.mark.parametrize("rows", [130, 1000])
def test_evaluate_counts_what_density_alone_would(store_of, rows):
    x = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    heldout = HeldOut(Rows(store_of(x=x), "x", batch=32))
    sae, density = LargestEntries(8, 1), Density(rows)
    chosen = {"reconstruction": Reconstruction(), "density": density}
    out = evaluate(sae, {}, heldout, chosen)
    assert density.run(sae, {}, heldout).items() <= out.items()
    assert out["density_rows"] == min(rows + 30, 300)
