"""encode_above: every backend finds what is above thresholds, or says that it has no room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.encode_above import IMPLS, encode_above
from saex.kernels.encode_topk import chosen_scores, pre_activations, xla_gpu
from saex.kernels.sparse_affine import sparse_affine
from saex.kernels.sparse_decode import decode_lines, dots_lines, scatter_lines

SHAPES = {  # b, d, n, and the shares of latents above in most rows and in a few
    "even": (24, 6, 64, 0.1, 0.1),
    "ragged": (37, 6, 130, 0.04, 0.7),
    "one row": (1, 5, 96, 0.2, 0.2),
    "blocks": (1100, 4, 40, 0.1, 0.5),
    "few latents": (9, 3, 7, 0.3, 1.0),
}

compiled = jax.jit(encode_above, static_argnums=(5, 6, 7))


def case(name):
    """(x, b_pre, W_enc, b_enc, least) and numpy's scores; every 11th row needs more."""
    b, d, n, share, more = SHAPES[name]
    rng = np.random.default_rng(len(name))
    x, W = rng.normal(size=(b, d)), rng.normal(size=(n, d))
    b_pre, b_enc = rng.normal(size=d), rng.normal(size=n)
    p = (x - b_pre) @ W.T + b_enc
    least = np.quantile(p, 1 - share, axis=0) + 0.05 * rng.random(n)
    x[5::11] = b_pre + (x[5::11] - b_pre) * (9 if more > share else 1)
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, b_pre, W, b_enc, least))


def found(above, b, n):
    """[b, n]: each value in its place, -inf where there is none, and no place twice."""
    out = np.full((b + 1, n), -np.inf, np.float32)
    values, indices, rows = (np.asarray(a) for a in above[:3])
    used = values != -np.inf
    line, slot = np.nonzero(used)
    at = rows[line], indices[line, slot]
    assert len(set(zip(*at))) == used.sum()
    order = at[0].astype(np.int64) * n + at[1]
    assert (np.diff(order) > 0).all() and (indices[~used] == 0).all()
    assert (rows[used.any(1)] < b).all() and (rows[~used.any(1)] == b).all()
    out[at] = values[used]
    return out[:b]


def test_a_gpu_takes_blocks_of_so_many_bytes(monkeypatch):
    """Places within a block are int32: one of 2^31 scores and more would have none."""
    args = case("blocks")
    b, n = args[0].shape[0], args[2].shape[0]
    whole = encode_above(*args, n, "float32", "gpu")
    assert xla_gpu.BYTES // 4 < 2**31
    monkeypatch.setattr(xla_gpu, "BYTES", 4 * n * 301)  # which does not divide the rows
    blocks = encode_above(*args, n, "float32", "gpu")
    assert whole.whole and blocks.whole
    np.testing.assert_array_equal(found(blocks, b, n), found(whole, b, n))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHAPES)
def test_all_that_is_above_is_found(name, impl):
    args = case(name)
    (b, _), n = args[0].shape, args[2].shape[0]
    p = np.asarray(pre_activations(*args[:4]))
    wanted = np.where(p > np.asarray(args[4]), p, -np.inf)
    above = compiled(*args, n // 2, "float32", impl)
    assert above.whole
    np.testing.assert_allclose(found(above, b, n), wanted, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_has_no_room_is_told(impl):
    args = case("even")
    b, n = args[0].shape[0], args[2].shape[0]
    count = int(np.sum(np.asarray(pre_activations(*args[:4])) > np.asarray(args[4])))
    for room in (-(-count // b), count // b - 1, n):
        above = compiled(*args, room, "float32", impl)
        assert bool(above.whole) == (room * b >= count) or impl == "tpu"  # by whole lines
        if above.whole:
            assert (found(above, b, n) > -np.inf).sum() == count
    with pytest.raises(ValueError, match="room=0"):
        encode_above(*args, 0, "float32", impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_above_and_what_is_not_a_number_is_found(impl):
    x, b_pre, W, b_enc, least = case("even")
    none = compiled(x, b_pre, W, b_enc - 1e6, least, 4, "float32", impl)
    assert none.whole and (none.values == -jnp.inf).all() and (none.rows == len(x)).all()
    bad = compiled(x.at[3].set(jnp.nan), b_pre, W, b_enc - 1e6, least, 8, "float32", impl)
    assert bad.whole and np.isnan(found(bad, *(len(a) for a in (x, W)))[3]).all()


def test_more_wide_rows_than_there_is_room_for_are_told():
    """The form for TPUs: of its rows one in eight may have more than it selects of each."""
    x, b_pre, W, b_enc, least = case("even")
    least = jnp.full_like(least, -1e6)
    for rows in (3, 4):
        few = jnp.where(jnp.arange(len(x)) < rows, 0.0, -2e6)[:, None]
        moved = jnp.concatenate([x, few], axis=1), jnp.append(b_pre, 0), jnp.c_[W, jnp.ones(len(W))]
        above = compiled(*moved, b_enc, least, 8, "float32", "tpu")
        assert bool(above.whole) == (rows == 3)
        if above.whole:
            p = np.asarray(pre_activations(*moved, b_enc))
            np.testing.assert_allclose(found(above, *p.shape)[:3], p[:3], atol=0.2)  # of 1e6


WHOSE = np.int32([0, 0, 1, 3, 3, 3, 4, 6, 6, 6])  # of 6 rows: 2 and 5 have no line


def lines(seed=0, s=3, n=11, d=4):
    rng = np.random.default_rng(seed)
    values, W, g = (rng.normal(size=shape) for shape in ((10, s), (n, d), (6, d)))
    values[WHOSE == 6] = 0
    values[rng.random(values.shape) < 0.2] = 0
    indices = np.stack([rng.permutation(n)[:s] for _ in WHOSE])
    indices[values == 0] = 0
    return (jnp.asarray(a, t) for a, t in zip((values, indices, W, g), "fiff"))


@pytest.fixture(params=["reference", "cpu", "cpu, few latents", "gpu"])
def impl(request, monkeypatch):
    """Of few latents a CPU's form multiplies matrices; it takes these for few only if told so."""
    name, few, _ = request.param.partition(", few")
    monkeypatch.setattr("saex.kernels.sparse_decode.cpu.NARROW", 16 if few else 0)
    jax.clear_caches()
    return name


@pytest.mark.parametrize("block", [2, 1024])
def test_lines_are_summed_for_their_rows(impl, block, monkeypatch):
    monkeypatch.setattr("saex.kernels.sparse_decode.cpu.BLOCK", block)
    values, indices, W, g = lines()
    f = np.zeros((7, len(W)))
    np.add.at(f, (WHOSE[:, None], np.asarray(indices)), np.asarray(values))
    whose = jnp.asarray(WHOSE)

    @jax.jit
    def ours(values, W):
        y, pull = jax.vjp(lambda v, W: decode_lines(v, indices, W, whose, 6, impl), values, W)
        dots = dots_lines(indices, g, W, whose, impl)
        return y, *pull(g), dots, scatter_lines(values, indices, g, whose, len(W), impl)

    y, dvalues, dW, dots, scattered = ours(values, W)
    np.testing.assert_allclose(y, f[:6] @ W, atol=1e-5)
    np.testing.assert_allclose(dW, f[:6].T @ g, atol=1e-5)
    used = (WHOSE < 6)[:, None]
    wanted = np.take_along_axis(np.r_[g, g[:1]][WHOSE] @ W.T, np.asarray(indices), axis=1)
    np.testing.assert_allclose(np.where(used, dvalues, 0), np.where(used, wanted, 0), atol=1e-5)
    np.testing.assert_allclose(np.where(used, dots, 0), np.where(used, wanted, 0), atol=1e-5)
    np.testing.assert_allclose(scattered, f[:6].T @ g, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_sparse_affine_of_lines_has_the_gradients_of_the_dense_form(impl, levels):
    """Rows of x have one or two reconstructions; all five gradients."""
    values, indices, W_dec, x = lines(3)
    x, whose = x[: 6 // levels], jnp.asarray(WHOSE)
    rng = np.random.default_rng(4)
    W_enc, a = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((11, 4), values.shape))
    c = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    weights = x, jnp.arange(4.0), W_enc, jnp.zeros(11), W_dec
    on = (values != 0).astype(jnp.float32)

    def plain(x, b_pre, W_enc, b_enc, W_dec):
        p = pre_activations(x, b_pre, W_enc, b_enc)
        p = p[jnp.minimum(whose // levels, len(x) - 1)[:, None], indices]
        v = on * (values + p - jax.lax.stop_gradient(p))  # the values, moved as p is
        terms = jnp.sum(v[:, :, None] * W_dec[indices], axis=1)
        y = jnp.zeros((7, 4)).at[whose].add(terms)[:6]
        return jnp.sum(v * a) + jnp.sum(jnp.cos(y) * c)

    def ours(*weights):
        v, y = sparse_affine(*weights, values, indices, impl, whose, levels)
        return jnp.sum(v * a * on) + jnp.sum(jnp.cos(y) * c)

    both = (jax.jit(jax.value_and_grad(f, range(5)))(*weights) for f in (ours, plain))
    (one, got), (two, wanted) = both
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


def test_chosen_scores_of_lines_have_the_encoder_s_gradient():
    values, indices, W, x = lines()
    through = jnp.where((WHOSE < 6)[:, None], values, 0)
    b_pre, b_enc = jnp.arange(4.0), jnp.zeros(11)

    def plain(x, b_pre, W, b_enc):
        p = pre_activations(x, b_pre, W, b_enc)
        p = p[jnp.minimum(WHOSE, 5)[:, None], indices]
        return jnp.sum(p * through)

    def ours(*weights):
        return jnp.sum(chosen_scores(*weights, values, indices, jnp.asarray(WHOSE)) * through)

    wanted, got = (jax.jit(jax.grad(f, range(4)))(x, b_pre, W, b_enc) for f in (plain, ours))
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, atol=1e-4)
