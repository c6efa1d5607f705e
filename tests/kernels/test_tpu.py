"""The TPU kernels, interpreted: races found, fresh memory NaN, copies that arrive only when waited
for. Tiles are small here, so that small shapes have many of them; sabotaged kernels must fail.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.encode_topk import cases as encode_cases
from saex.kernels.encode_topk import encode_topk
from saex.kernels.encode_topk import pallas_tpu as encode_tpu
from saex.kernels.encode_topk import reference as encode_ref
from saex.kernels.sparse_affine import pallas_tpu as affine_tpu
from saex.kernels.sparse_affine import reference as affine_ref
from saex.kernels.sparse_affine import sparse_affine
from saex.kernels.sparse_decode import cases as decode_cases
from saex.kernels.sparse_decode import pallas_tpu as decode_tpu
from saex.kernels.sparse_decode import pallas_tpu_latents as latents
from saex.kernels.sparse_decode import reference as decode_ref
from saex.kernels.sparse_decode import sparse_decode
from saex.kernels.topk import cases as topk_cases
from saex.kernels.topk import pallas_tpu as topk_tpu
from saex.kernels.topk import pallas_tpu_bins as bins
from saex.kernels.topk import reference as topk_ref
from saex.kernels.topk import top_k
from tests.kernels import oracles, test_encode, test_ops

pytestmark = pytest.mark.interpreted  # a stage of its own in .ci/run: minutes of compilation


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(adam_tpu, "VMEM", 0)  # 8 rows a block
    monkeypatch.setattr(decode_tpu, "ROWS", 8)
    monkeypatch.setattr(decode_tpu, "RING", 3)
    for name, size in {"TILE": 16, "CHUNK": 16}.items():
        monkeypatch.setattr(latents, name, size)
    monkeypatch.setattr(affine_tpu, "CHUNK", 16)
    for name, size in {"DEPTH": 3, "COLUMNS": 256, "ROWS": 16}.items():
        monkeypatch.setattr(bins, name, size)


def interpreted(f, *args):
    """f on an interpreted TPU; raises AssertionError on a race."""
    how = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
    )
    with pltpu.force_tpu_interpret_mode(how):
        out = jax.block_until_ready(f(*args))
    if jax.__version_info__ < (0, 11):  # later versions raise
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert not interpret_pallas_call.races.races_found, "race"
    return out


def slots(b, n, k, seed=0, heavy=False):
    """values [b, k] (one unused slot a row), indices without repeats in a row."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n + 1) ** (1.5 if heavy else 0)
    indices = [rng.choice(n, k, replace=False, p=weights / weights.sum()) for _ in range(b)]
    values = rng.normal(size=(b, k))
    values[:, k // 2] = 0
    indices = np.where(values != 0, np.stack(indices), 0)
    return jnp.asarray(values, jnp.float32), jnp.asarray(indices, jnp.int32)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def close(got, want, atol=2e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


# --------------------------------------------------------------------------- decode and its parts


@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_decode_and_its_gradients_equal_the_reference(case):
    b, d, n, k = decode_cases.SMALL[case]
    values, indices = slots(b, n, k)
    rows, g = normal(1, (n, d), (b, d))

    def pulled(impl):
        y, pull = jax.vjp(lambda v, w: sparse_decode(v, indices, w, impl), values, rows)
        return y, *pull(g)

    close(interpreted(pulled, "pallas_tpu"), pulled("reference"))


def test_decode_of_a_ragged_batch_wider_than_a_register():
    values, indices = slots(11, 300, 9)
    rows, g = normal(2, (300, 200), (11, 200))
    close(interpreted(decode_tpu.decode, values, indices, rows),
          decode_ref.decode(values, indices, rows))  # fmt: skip
    close(interpreted(decode_tpu.dots, indices, g, rows), decode_ref.dots(indices, g, rows))


def test_decode_reads_nothing_of_unused_slots():
    values, indices = slots(5, 32, 4)
    (rows,) = normal(3, (32, 8))
    used = jnp.where(jnp.arange(32)[:, None] == 0, jnp.nan, rows)
    indices = jnp.where((values != 0) & (indices == 0), 1, indices)
    y = interpreted(decode_tpu.decode, values, indices, used)
    close(y, decode_ref.decode(values, indices, rows))


# ------------------------------------------------------------------------- sums over the latents


@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_affine_gradients_equal_the_reference(case):
    b, d, n, k = decode_cases.SMALL[case]
    values, indices = slots(b, n, k)
    dvalues, g, x, W_dec = normal(4, (b, k), (b, d + 1), (b, d), (n, d + 1))
    args = values, dvalues, indices, g, x, W_dec
    close(interpreted(affine_tpu.grads, *args), affine_ref.grads(*args))


def heavy_args():
    """Latents that fill several chunks, tiles without a slot, n and d that fill no tile."""
    values, indices = slots(24, 70, 5, heavy=True)
    dvalues, g, x, W_dec = normal(5, (24, 5), (24, 130), (24, 7), (70, 130))
    return values, dvalues, jnp.where(indices > 20, 69, indices), g, x, W_dec


def test_affine_gradients_of_heavy_tailed_latents():
    args = heavy_args()
    close(interpreted(affine_tpu.grads, *args), affine_ref.grads(*args), atol=1e-4)


def test_affine_gradients_have_the_same_bits_every_time():
    args = heavy_args()
    for one, other in zip(interpreted(affine_tpu.grads, *args),
                          interpreted(affine_tpu.grads, *args)):  # fmt: skip
        np.testing.assert_array_equal(one, other)


def test_what_is_not_finite_is_in_the_gradients_of_its_own_latents():
    values, indices = slots(6, 40, 3)
    dvalues, g, x, W_dec = normal(14, (6, 3), (6, 8), (6, 8), (40, 8))
    g, x = g.at[1].set(jnp.nan), x.at[2, 0].set(jnp.inf)
    args = values, dvalues, indices, g, x, W_dec
    got, want = interpreted(affine_tpu.grads, *args), affine_ref.grads(*args)
    for one, other in zip(got, want, strict=True):
        hurt = ~np.isfinite(other).reshape(40, -1).all(axis=1)
        assert hurt.any()
        assert (~np.isfinite(one).reshape(40, -1).all(axis=1))[hurt].all()


def test_no_slot_in_use_gives_zeros():
    values, indices = slots(4, 40, 2)
    dvalues, g, x, W_dec = normal(6, (4, 2), (4, 8), (4, 8), (40, 8))
    grads = interpreted(affine_tpu.grads, 0 * values, dvalues, 0 * indices, g, x, W_dec)
    close(grads, jax.tree.map(jnp.zeros_like, grads))


def test_every_slot_is_in_one_work_item_and_every_tile_has_one():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        b, k, n = rng.integers(1, 40), rng.integers(1, 8), rng.integers(8, 200)
        values, indices = slots(b, n, min(k, n), seed, heavy=seed % 2 == 0)
        work = latents.plan(indices, values != 0, (values,), int(n))
        total = int(work.total[0])
        assert total <= work.tile.shape[0]
        tile, chunk = np.asarray(work.tile), np.asarray(work.chunk)
        assert sorted(set(tile[:total])) == list(range(-(-n // latents.TILE)))
        assert (np.diff(tile) >= 0).all() and set(np.diff(chunk[:total])) <= {0, 1}
        pairs = set(zip(tile[:total], chunk[:total]))
        flat = np.asarray(work.latent).reshape(-1)
        needed = {(x // latents.TILE, i // latents.CHUNK) for i, x in enumerate(flat) if x < n}
        assert needed <= pairs


# ------------------------------------------------------------------------------------- selection


def scores_of(kind, b, n, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(b, n)).astype(np.float32)
    if kind == "ties":
        return np.round(scores)
    if kind == "one bin":
        scores[:, :: bins.LANES] += 10
    return scores


@pytest.mark.parametrize("case", sorted(topk_cases.SMALL))
def test_top_k_equals_the_reference(case):
    b, n, k = topk_cases.SMALL[case]
    scores = np.concatenate([oracles.random_scores(kind, b, n) for kind in oracles.KINDS])
    same(interpreted(topk_tpu.top_k, jnp.asarray(scores), k), oracles.top_k(scores, k))


def same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind, exact", [("normal", True), ("ties", True), ("one bin", False)])
def test_a_full_bin_is_noticed_and_mended(kind, exact):
    scores = jnp.asarray(scores_of(kind, 5, 700)).astype(jnp.bfloat16)
    spec = topk_tpu.block(5, 700, 4)
    like = jax.typeof(scores)
    args = topk_tpu.tile_of, [scores], [spec], like, 700, 4, bins.COLUMNS, 0, 0
    found = interpreted(bins.select, *args)
    assert bool(found[2]) == exact
    same(interpreted(topk_tpu.top_k, scores, 4), topk_ref.top_k(scores, 4))


def test_top_k_has_the_gradient_of_the_chosen_entries():
    scores = jnp.asarray(scores_of("normal", 3, 64))
    grad = jax.grad(lambda s, impl: jnp.sum(jnp.sin(top_k(s, 3, impl)[0])))
    close(interpreted(grad, scores, "pallas_tpu"), grad(scores, "reference"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", sorted(encode_cases.SMALL))
def test_encode_topk_equals_the_reference(case, dtype):
    b, d, n, k = encode_cases.SMALL[case]
    rng = np.random.default_rng(7)  # whole numbers: exact in bf16, and many ties
    x, b_pre, W, b_enc = (
        jnp.asarray(rng.integers(-3, 4, s), jnp.float32) for s in ((b, d), (d,), (n, d), (n,))
    )
    got = interpreted(encode_tpu.encode_topk, x, b_pre, W, b_enc, k, dtype)
    same(got, encode_ref.encode_topk(x, b_pre, W, b_enc, k, dtype))


def test_encode_topk_gives_what_is_not_finite_its_place():
    args = test_encode.not_finite(5, 6, 300)
    same(interpreted(encode_tpu.encode_topk, *args, 4), encode_ref.encode_topk(*args, 4))


def test_encode_topk_of_bf16_inputs_is_close_to_that_of_float32():
    args = normal(11, (16, 32), (32,), (512, 32), (512,))
    values, _ = interpreted(encode_tpu.encode_topk, *args, 4, "bfloat16")
    off = np.abs(values - encode_ref.encode_topk(*args, 4)[0])
    assert off.max() < 0.2 and np.quantile(off, 0.9) < 0.06


def test_encode_topk_on_the_tpu_backend_has_the_gradients_of_the_reference():
    args = normal(12, (5, 6), (6,), (40, 6), (40,))

    def grads(impl):
        loss = lambda *a: jnp.sum(jnp.sin(encode_topk(*a, 3, "float32", impl)[0]))  # noqa: E731
        return jax.grad(loss, argnums=range(4))(*args)

    close(interpreted(grads, "pallas_tpu"), grads("reference"))


def test_encode_topk_mends_a_full_bin_block_by_block(monkeypatch):
    monkeypatch.setattr(topk_tpu, "FALLBACK", 8 * 900)
    (x,) = normal(8, (19, 5))
    x = jnp.abs(x)
    W = jnp.where(jnp.arange(900)[:, None] % bins.LANES == 5, 1.0, -1.0) * jnp.ones((900, 5))
    args = x, jnp.zeros(5), W, jnp.arange(900) / 4096.0, 6
    got = interpreted(encode_tpu.encode_topk, *args)
    want = encode_ref.encode_topk(*args)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


# --------------------------------------------------------------------------- the checks can fail


def no_wait(*_):
    pass


def fetch_into_the_next_buffer(wanted, rows, ring, arrived, r):
    for j in range(wanted.shape[1] - 1):
        to = ring.at[(r + 1) % decode_tpu.RING, pl.ds(j, 1)]
        source = rows.at[pl.ds(wanted[r, j], 1)]
        pltpu.make_async_copy(source, to, arrived.at[r % decode_tpu.RING]).start()


def fetch_into_one_buffer(rows, batch, buffers, arrived, slot):
    for j in range(latents.CHUNK):
        source = batch.at[pl.ds(rows[0, 0, j], 1)]
        pltpu.make_async_copy(source, buffers.at[0, pl.ds(j, 1)], arrived.at[slot]).start()


@pytest.mark.parametrize(
    "name, mutant", [("_wait", no_wait), ("_fetch", fetch_into_the_next_buffer)]
)
def test_a_sabotaged_decode_is_found_out(monkeypatch, name, mutant):
    monkeypatch.setattr(decode_tpu, name, mutant)
    values, indices = slots(8, 32, 8)
    (rows,) = normal(10, (32, 8))
    with pytest.raises(Exception, match=r"race|Not equal|tolerance"):  # 0.12 raises at a race
        close(
            interpreted(decode_tpu.decode, values, indices, rows),
            decode_ref.decode(values, indices, rows),
        )


def test_chunks_that_share_a_buffer_are_found_out(monkeypatch):
    monkeypatch.setattr(latents, "_fetch", fetch_into_one_buffer)
    args = heavy_args()
    with pytest.raises(Exception, match=r"race|Not equal|tolerance"):
        close(interpreted(affine_tpu.grads, *args), affine_ref.grads(*args), atol=1e-4)


def test_sums_that_start_afresh_in_every_chunk_are_found_out(monkeypatch):
    args = heavy_args()

    def overwrite(here, factors, fetched, tiles, add):
        affine_item(here, factors, fetched, tiles, lambda at, part: add(at, 0 * part))

    affine_item = affine_tpu._item
    monkeypatch.setattr(affine_tpu, "_item", overwrite)
    with pytest.raises(AssertionError):
        close(interpreted(affine_tpu.grads, *args), affine_ref.grads(*args), atol=1e-4)


def test_sparse_affine_on_the_tpu_backend_has_the_gradients_of_the_reference():
    b, d, n, k = decode_cases.SMALL["few"]
    values, indices = slots(b, n, k)
    weights = normal(9, (b, d), (d,), (n, d), (n,), (n, d))

    def grads(impl):
        def loss(*weights):
            v, y = sparse_affine(*weights, values, indices, impl)
            return jnp.sum(jnp.sin(v)) + jnp.sum(jnp.cos(y))

        return jax.grad(loss, argnums=range(5))(*weights)

    close(interpreted(grads, "pallas_tpu"), grads("reference"))


def test_dead_latents_beside_the_living_equal_dense_products():
    args = test_ops.aux_case()
    through = normal(13, args[1].shape, (6, 6), (6, 6))
    got = interpreted(test_ops.aux_of, "pallas_tpu", *args, through)
    for one, other in zip(got, test_ops.dense_aux(*args, through), strict=True):
        test_ops.close(one, other, atol=1e-4)


def before_its_equals(kept, new, slab):
    """A column goes before those that came earlier and are equal."""
    lower = bins_inserted([(key - 1, at) for key, at in kept], new, slab)
    return [(jnp.where(at == slab, key, key + 1), at) for key, at in lower]


def twice_in_place_of_what_it_displaces(kept, new, slab):
    first, _, *rest = bins_inserted(kept, new, slab)
    return [first, first, *rest]


bins_inserted = bins._inserted


@pytest.mark.parametrize("mutant", [before_its_equals, twice_in_place_of_what_it_displaces])
def test_bins_that_are_kept_wrongly_are_found_out(monkeypatch, mutant):
    scores = scores_of("normal", 3, 700)
    scores[:, [5, 5 + bins.LANES]] = (
        9  # one bin; no more than it keeps, so that the check is silent
    )
    scores[1, 5 + 2 * bins.LANES] = 10
    wanted = oracles.top_k(scores, 2)
    same(interpreted(topk_tpu.top_k, jnp.asarray(scores), 2), wanted)
    monkeypatch.setattr(bins, "_inserted", mutant)
    with pytest.raises(AssertionError):
        same(interpreted(topk_tpu.top_k, jnp.asarray(scores), 2), wanted)


def without_bias(x, W, b_enc):
    return encode_scores(x, W, b_enc) - b_enc[...]


def with_a_tile_of_others(x, W, b_enc):
    return encode_scores(x, W, b_enc)[:, ::-1]


encode_scores = encode_tpu._scores


@pytest.mark.parametrize("mutant", [without_bias, with_a_tile_of_others])
def test_an_encoder_of_other_scores_is_found_out(monkeypatch, mutant):
    monkeypatch.setattr(encode_tpu, "_scores", mutant)
    args = normal(14, (5, 6), (6,), (40, 6), (40,))
    with pytest.raises(AssertionError):
        close(interpreted(encode_tpu.encode_topk, *args, 3), encode_ref.encode_topk(*args, 3))
