"""The GPU backends on CPU: XLA's forms as they are, Hopper kernels interpreted, races found.

Firing is heavy-tailed here as in training. Sabotaged kernels must fail.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels import csc
from saex.kernels.encode_topk import cases as encode_cases
from saex.kernels.encode_topk import encode_topk
from saex.kernels.encode_topk import pallas_gpu as encode_gpu
from saex.kernels.encode_topk import reference as encode_ref
from saex.kernels.encode_topk import xla_gpu as encode_xla
from saex.kernels.sparse_affine import pallas_gpu as affine_gpu
from saex.kernels.sparse_affine import reference as affine_ref
from saex.kernels.sparse_affine import sparse_affine
from saex.kernels.sparse_affine import xla_gpu as affine_xla
from saex.kernels.sparse_decode import cases as decode_cases
from saex.kernels.sparse_decode import pallas_gpu as decode_gpu
from saex.kernels.sparse_decode import reference as decode_ref
from saex.kernels.sparse_decode import xla_gpu as decode_xla
from saex.kernels.topk import reference as topk_ref
from saex.kernels.topk import xla_gpu as topk_xla
from tests.kernels import oracles

pytestmark = pytest.mark.interpreted  # a stage of its own in .ci/run: minutes of compilation


@pytest.fixture(autouse=True)
def one_compilation(monkeypatch):
    """An interpreted kernel's threads run one program, compiled before any of them starts.

    The interpreter lets each thread compile for itself. On few cores that hangs: one that runs
    already, and waits for the others at a barrier, holds the pool in which they would compile.
    """
    from jax._src import core
    from jax._src.pallas.mosaic.interpret import thread_map

    lock, programs = threading.Lock(), {}

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in programs:
                traced = jax.jit(lambda c, *a: core.eval_jaxpr(jaxpr, c, *a)).trace(consts, *args)
                programs[id(jaxpr)] = jaxpr, traced.lower().compile()
        programs[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


def slots(b, n, k, seed=0):
    """values [b, k], a fifth of them unused, and Zipf-distributed latents without repeats."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, n + 1) ** 1.3
    indices = np.stack([rng.choice(n, k, replace=False, p=p / p.sum()) for _ in range(b)])
    values = np.where(rng.random((b, k)) < 0.2, 0, rng.normal(size=(b, k)))
    return jnp.float32(values), jnp.int32(np.where(values != 0, indices, 0))


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.float32(rng.normal(size=s)) for s in shapes)


def close(got, want, atol=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol)


def no_races():
    if jax.__version_info__ < (0, 11):  # later versions raise
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        assert not interpret_pallas_call.get_races().races_found, "race"


# -------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "b, n, k", [(3, 2048, 1), (2, 2500, 7), (2, 1500, 1500), (2, 40_000, 16), (1, 100_003, 256)]
)
def test_top_k_of_several_levels_is_exact_with_ties_to_the_lowest_index(b, n, k, dtype):
    rng = np.random.default_rng(n)
    rows = [rng.normal(size=(b, n)), rng.integers(0, 3, (b, n)), np.zeros((b, n))]
    rows += [oracles.random_scores(kind, b, n) for kind in ("zeros", "-inf", "nan")]
    scores = jnp.asarray(np.concatenate(rows), dtype)
    values, indices = jax.jit(topk_xla.top_k, static_argnums=1)(scores, k)
    wanted, order = oracles.top_k(np.asarray(scores.astype(jnp.float32)), k)
    np.testing.assert_array_equal(values.astype(jnp.float32), wanted)
    np.testing.assert_array_equal(indices, order)


def test_the_second_level_needs_its_groups_in_order(monkeypatch):
    scores = jnp.zeros((1, 4096)).at[0, 2000].set(1.0).at[0, 9].set(0.5)
    assert topk_xla.group_of(4096, 3) > 1
    _, order = topk_ref.top_k(scores, 3)
    np.testing.assert_array_equal(topk_xla.top_k(scores, 3)[1], order)
    monkeypatch.setattr(topk_xla.jnp, "sort", lambda chosen, axis: chosen)
    assert not np.array_equal(topk_xla.top_k(scores, 3)[1], order)


@pytest.mark.parametrize("case", sorted(encode_cases.SMALL))
def test_encode_topk_by_xla_equals_the_reference_in_blocks_too(case, monkeypatch):
    b, d, n, k = encode_cases.SMALL[case]
    args = normal(1, (b, d), (d,), (n, d), (n,))
    want = encode_ref.encode_topk(*args, k)
    close(encode_xla.encode_topk(*args, k), want)
    monkeypatch.setattr(encode_xla, "BYTES", 4 * n * 2)
    assert encode_xla.block_rows(b, n) < b
    close(encode_xla.encode_topk(*args, k), want)


# ----------------------------------------------------------------------------- encode_topk, Hopper


def encode_case(n=600):
    """Three tiles of latents for two programs; the last tile is not full. Bias decides a lot."""
    return normal(2, (5, 70), (70,), (n, 70), (n,))


def test_encode_topk_on_hopper_equals_the_reference():
    args = encode_case()
    # compiled anew in each call: a sabotaged kernel must not meet a sound one that was kept
    encode = jax.jit(lambda *args: encode_gpu.encode_topk(*args, 4, "bfloat16"))
    values, indices = encode(*args)
    no_races()
    wanted, order = encode_ref.encode_topk(*args, 4, "bfloat16")
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(values, wanted, atol=1e-5)


HOPPER = {"one of two tiles": (300, 1), "all": (40, 40), "all of two tiles": (264, 264)}


@pytest.mark.parametrize("case", HOPPER)
def test_encode_topk_on_hopper_is_exact_with_ties_and_without_finite_scores(case):
    """Whole numbers, full of ties; the bias takes the latents of whole groups to -inf."""
    n, k = HOPPER[case]
    x, b_pre, W_enc, b_enc = oracles.whole_numbers(n, (3, 6), (6,), (n, 6), (n,))
    b_enc = b_enc.at[8:32].set(-jnp.inf).at[n - 1].set(-jnp.inf)
    scores = np.asarray((x - b_pre[None]) @ W_enc.T + b_enc[None])
    encode = jax.jit(lambda *args: encode_gpu.encode_topk(*args, k, "bfloat16"))
    values, indices = encode(x, b_pre, W_enc, b_enc)
    no_races()
    wanted, order = oracles.top_k(scores, k)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, wanted)


def test_encode_topk_on_hopper_with_other_scores_than_maxima_fails(monkeypatch):
    write = encode_gpu._write
    monkeypatch.setattr(encode_gpu, "_write", lambda tile, *to: write(tile + 1, *to))
    with pytest.raises(AssertionError):
        test_encode_topk_on_hopper_equals_the_reference()


def test_encode_topk_on_hopper_keeps_to_its_latents_where_rows_are_not_finite():
    """The last tile is filled up; NaN among a group's scores is left to the hardware's maximum."""
    x, b_pre, W_enc, b_enc = encode_case()
    x = x.at[0, 1].set(jnp.nan).at[1, 0].set(jnp.inf).at[2, 0].set(-jnp.inf)
    args = x, b_pre, W_enc.at[-1, 0].set(jnp.abs(W_enc[-1, 0])), b_enc
    encode = jax.jit(lambda *args: encode_gpu.encode_topk(*args, 4, "bfloat16"))
    for one, other in zip(encode(*args), encode_ref.encode_topk(*args, 4, "bfloat16")):
        np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_encode_topk_on_hopper_has_the_gradients_of_the_reference():
    def grads(impl):
        loss = lambda *a: jnp.sum(jnp.sin(encode_topk(*a, 4, "bfloat16", impl)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=range(4)))(*encode_case())

    close(grads("pallas_gpu"), grads("reference"), atol=1e-4)


def test_encode_topk_on_hopper_refuses_float32():
    with pytest.raises(ValueError, match="takes 'bfloat16'"):
        encode_gpu.encode_topk(*encode_case(), 4, "float32")


# --------------------------------------------------------------------------------- sums over slots


@pytest.mark.parametrize("b, n, k, d", [(200, 12, 4, 5), (20, 300, 3, 5), (3, 9, 70, 4)])
def test_xla_sums_over_latents_equal_the_reference(b, n, k, d):
    values, indices = slots(b, n, min(k, n))
    dvalues, g, x, W = normal(3, values.shape, (b, d), (b, d + 1), (n, d))
    args = values, dvalues, indices, g, x, W
    close(jax.jit(affine_xla.grads)(*args), affine_ref.grads(*args), atol=2e-4)
    if b < 100:  # compiling all levels of the largest twice takes its time
        close(
            decode_xla.scatter(values, indices, g, n),
            decode_ref.scatter(values, indices, g, n),
            2e-4,
        )


def test_xla_decode_takes_many_slots_in_turns():
    values, indices = slots(3, 400, 150)
    rows = normal(4, (400, 6))[0]
    close(decode_xla.decode(values, indices, rows), decode_ref.decode(values, indices, rows))


def test_xla_sums_do_not_depend_on_anything_but_the_input():
    values, indices = slots(60, 20, 4)
    dvalues, g, x, W = normal(5, values.shape, (60, 4), (60, 4), (20, 4))
    one, other = (jax.jit(affine_xla.grads)(values, dvalues, indices, g, x, W) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_pieces_cover_every_segment_once():
    starts = jnp.int32([0, 0, 7, 8, 8, 20])
    pieces = csc.cut(starts, 3, 20 // 3 + 5)
    covered = [
        (int(i), s)
        for i, first, length in zip(pieces.owner, pieces.first, pieces.length)
        for s in range(first, first + length)
    ]
    assert covered == [(1, s) for s in range(7)] + [(2, 7)] + [(4, s) for s in range(8, 20)]
    assert max(pieces.length) <= 3
    np.testing.assert_array_equal(pieces.starts, [0, 0, 3, 4, 4, 8])
    rest = csc.cut(starts, 3, 20 // 3, skip=1)
    np.testing.assert_array_equal(rest.starts, [0, 0, 2, 2, 2, 5])


# ---------------------------------------------------------------------- kernels for Hopper, slots


@pytest.mark.parametrize("case", sorted(decode_cases.SMALL))
def test_hopper_decode_and_its_transposes_equal_the_reference(case):
    b, d, n, k = decode_cases.SMALL[case]
    values, indices = slots(b, n, k)
    rows, g = normal(6, (n, d), (b, d))
    close(
        jax.jit(decode_gpu.decode)(values, indices, rows), decode_ref.decode(values, indices, rows)
    )
    close(jax.jit(decode_gpu.dots)(indices, g, rows), decode_ref.dots(indices, g, rows))
    scatter = jax.jit(decode_gpu.scatter, static_argnums=3)
    close(scatter(values, indices, g, n), decode_ref.scatter(values, indices, g, n))
    no_races()


@pytest.mark.parametrize("sabotage", ["a slot", "a row"])
@pytest.mark.parametrize("op", ["decode", "dots"])
def test_a_hopper_kernel_that_leaves_something_out_fails(op, sabotage, monkeypatch):
    if sabotage == "a slot":
        loop = jax.lax.fori_loop
        leave = lambda first, last, *rest: loop(first, last - 1, *rest)  # noqa: E731
        monkeypatch.setattr(decode_gpu.jax.lax, "fori_loop", leave)
    else:
        whole = decode_gpu.launch
        leave = lambda body, out, grid, *rest: whole(body, out, {"row": grid["row"] - 1}, *rest)  # noqa: E731
        monkeypatch.setattr(decode_gpu, "launch", leave)
    b, d, n, k = decode_cases.SMALL["few"]
    values, indices = slots(b, n, k)
    rows, g = normal(6, (n, d), (b, d))
    values = jnp.where(values == 0, 1, values)
    args = (values, indices, rows) if op == "decode" else (indices, g, rows)
    wanted = getattr(decode_ref, op)(*args)
    with pytest.raises(AssertionError):
        close(jax.jit(lambda *a: getattr(decode_gpu, op)(*a))(*args), wanted)


def test_hopper_decode_of_bf16_rows_accumulates_in_float32():
    values, indices = slots(2, 16, 6)
    rows = normal(7, (16, 130))[0].astype(jnp.bfloat16)
    got = decode_gpu.decode(values, indices, rows)
    assert got.dtype == jnp.float32
    close(got, decode_ref.decode(values, indices, rows.astype(jnp.float32)))


def affine_case():
    """Latent 0 has three pieces of three slots, others none at all."""
    values, indices = slots(14, 16, 2)
    return values, *normal(8, values.shape), indices, *normal(9, (14, 6), (14, 130), (16, 6))


def hopper_grads(*args):
    got = jax.jit(lambda *args: affine_gpu.grads(*args, piece=3))(*args)
    no_races()
    return got


def test_hopper_backward_pass_equals_the_reference():
    args = affine_case()
    indices = np.asarray(args[2])[np.asarray(args[0]) != 0]
    counts = np.bincount(indices, minlength=16)
    assert counts.max() > 6 and counts.min() == 0
    close(hopper_grads(*args), affine_ref.grads(*args))


@pytest.mark.parametrize("sabotage", ["others", "first"])
def test_hopper_backward_pass_that_drops_a_piece_fails(sabotage, monkeypatch):
    def wrong(*args, **options):
        pieces = cut(*args, **options)
        if sabotage == "others":  # what hot latents have beyond their first piece is not added
            return pieces._replace(starts=jnp.zeros_like(pieces.starts))
        return pieces._replace(length=jnp.maximum(pieces.length - 1, 0))

    cut = csc.cut
    monkeypatch.setattr(csc, "cut", wrong)
    args = affine_case()
    with pytest.raises(AssertionError):
        close(hopper_grads(*args), affine_ref.grads(*args))


def test_hopper_kernels_serve_the_op_by_name():
    b, d, n, k = decode_cases.SMALL["few"]
    values, indices = slots(b, n, k)
    weights = normal(10, (b, d), (d,), (n, d), (n,), (n, d))

    def loss(impl, weights):
        v, y = sparse_affine(*weights, values, indices, impl)
        return jnp.sum(jnp.sin(v)) + jnp.sum(jnp.cos(y))

    got, want = (jax.grad(lambda w, i=i: loss(i, w))(weights) for i in ("pallas_gpu", "reference"))
    close(got, want, atol=1e-4)
