import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.data import Column, Store, StoreWriter
from saex.evals import Rows
from saex.evals.heldout import context_starts
from saex.report.scan import decoder_rows, scan, values_at
from saex.sae import DenseCodes, ReLU, SparseCodes, TopK


@dataclasses.dataclass(frozen=True)
class Entries:
    """The row itself as codes, dense, or its two largest entries, sparse."""

    d_in: int
    codes: ClassVar[type] = DenseCodes

    @property
    def n(self):
        return self.d_in

    d_out = n

    def encode(self, params, x):
        return DenseCodes(x.astype(jnp.float32))


class Largest(Entries):
    codes: ClassVar[type] = SparseCodes

    def encode(self, params, x):
        values, indices = jax.lax.top_k(x.astype(jnp.float32), 2)
        return SparseCodes(values, indices)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """x [60, 6] in contexts of 1 to 12 rows; many zeros, some negative, some equal values."""
    rng = np.random.default_rng(0)
    lengths = [12, 1, 7, 12, 12, 4, 12]
    x = np.round(rng.normal(size=(sum(lengths), 6)), 1) * (rng.random((sum(lengths), 6)) < 0.6)
    columns = {
        "x": x.astype(np.float32),
        "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "document": np.repeat(np.arange(7, dtype=np.int32) // 2, lengths),
    }
    path = tmp_path_factory.mktemp("scan") / "store"
    with StoreWriter(path, {k: Column(v.shape[1:], str(v.dtype)) for k, v in columns.items()}) as w:
        w.append(columns)
        w.commit({"rows": 60})
        w.finish()
    return columns, Store.open(path), np.cumsum([0, *lengths])


def test_contexts_begin_where_positions_do(data):
    _, store, starts = data
    np.testing.assert_array_equal(context_starts(store), starts)


@pytest.mark.parametrize("batch", [5, 16, 100])
@pytest.mark.parametrize("sae", [Entries(6), Largest(6)], ids=["dense", "sparse"])
def test_scan_equals_going_through_all_rows(data, sae, batch):
    columns, store, starts = data
    rows = Rows(store, "x", skip_positions=(0,), batch=batch)
    found = scan(sae, {}, rows, starts, 1000, 4)
    x, kept = np.abs(columns["x"]), columns["position"] != 0
    if isinstance(sae, Largest):
        cut = np.argsort(-columns["x"], axis=1, kind="stable")[:, 2:]
        np.put_along_axis(x, cut, 0, axis=1)
    x[~kept] = 0
    np.testing.assert_array_equal(found.fired, (x > 0).sum(axis=0))
    np.testing.assert_allclose(found.total, x.sum(axis=0), rtol=1e-6)
    assert found.rows == kept.sum()
    peaks = np.stack([x[a:b].max(axis=0) for a, b in itertools.pairwise(starts)])
    best = -np.sort(-peaks, axis=0)[:4].T
    np.testing.assert_array_equal(found.top, best)
    real = found.top > 0
    latents = np.broadcast_to(np.arange(6)[:, None], real.shape)
    np.testing.assert_array_equal(x[found.where[real], latents[real]], found.top[real])
    context = np.searchsorted(starts, found.where, "right")
    for latent in range(6):  # one row of each context
        assert len(set(context[latent][real[latent]])) == real[latent].sum()


def test_without_contexts_every_row_is_its_own(data):
    columns, store, _ = data
    found = scan(Entries(6), {}, Rows(store, "x", batch=7), None, 1000, 5)
    np.testing.assert_array_equal(found.top, -np.sort(-np.abs(columns["x"]), axis=0)[:5].T)


@pytest.mark.parametrize("sae", [Entries(6), Largest(6)], ids=["dense", "sparse"])
def test_values_at_any_rows(data, sae):
    columns, store, _ = data
    at, latents = np.array([40, 3, 3, 59, 4]), np.array([0, 5, 1, 2, 0])
    expected = np.asarray(sae.encode({}, jnp.asarray(columns["x"])).dense(6))[at, latents]
    got = values_at(sae, {}, Rows(store, "x", batch=2), at, latents)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("sae", [TopK(6, 32, 3), ReLU(6, 32)])
def test_decoder_rows_are_in_raw_units(sae):
    x = 5 * jax.random.normal(jax.random.key(1), (64, 6))
    params, _ = sae.init(jax.random.key(0), {"x": x})
    expected = params["W_dec"][jnp.array([7, 0, 31])] / params["scale"]
    np.testing.assert_allclose(
        decoder_rows(sae, params, [7, 0, 31]), expected, rtol=1e-5, atol=1e-6
    )
