"""Lines: every kept slot once, in its row's, none of two levels; and word of what has no room."""

import jax.numpy as jnp
import numpy as np
import pytest

from saex.kernels.encode_above import Above
from saex.sae import ragged, sums
from saex.sae.base import DenseCodes
from saex.sae.ragged import laid_out

B, N = 7, 96


def case(seed=0):
    """(above, keep, [b, n] of what is kept): one slot a line, as the CPU's backend hands it on."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(B, N)).astype(np.float32)
    p[2], p[4, 40:] = -1, np.abs(p[4, 40:])  # a row without any, one with many
    rows, latents = np.nonzero(p > 0.3)
    room = 5  # not used, at the end
    values = np.pad(p[rows, latents], (0, room), constant_values=-np.inf)
    rows, latents = np.pad(rows, (0, room), constant_values=B), np.pad(latents, (0, room))
    arrays = (jnp.asarray(a) for a in (values[:, None], np.int32(latents)[:, None], np.int32(rows)))
    keep = values > 0.9
    wanted = np.zeros((B + 1, N), np.float32)
    wanted[rows[keep], latents[keep]] = values[keep]
    return Above(*arrays, jnp.bool_(True)), jnp.asarray(keep)[:, None], wanted[:B]


def dense(codes):
    out = np.zeros((codes.b + 1, N), np.float32)
    np.add.at(out, (np.asarray(codes.rows)[:, None], codes.indices), codes.values)
    return out[: codes.b]


@pytest.mark.parametrize("levels", [1, 3])
def test_what_is_kept_lies_in_lines_of_its_row(levels):
    above, keep, wanted = case()

    def level(latents):
        return (latents >= 10).astype(jnp.int32) + (latents >= 50)

    how = {} if levels == 1 else {"level": level(above.indices), "levels": levels}
    codes, fits = laid_out(above, keep, jnp.where(keep, above.values, 9), B, 200, **how)
    assert fits
    np.testing.assert_array_equal(dense(codes), wanted)
    values, rows = np.asarray(codes.values), np.asarray(codes.rows)
    used = (values != 0).sum(1)
    assert (np.diff(rows) >= 0).all() and ((rows < B) == (used > 0)).all()
    for line, count in zip(values, used):
        assert (line[:count] != 0).all()  # from the front
    counts = (wanted != 0).sum(1)
    if levels == 1:
        needed = -(-counts // ragged.SLOTS)
    else:
        at = np.asarray(level(jnp.arange(N)))
        each = np.stack([(wanted[:, at == i] != 0).sum(1) for i in range(levels)])
        needed = -(-each // ragged.SLOTS_OF_LEVELS).sum(0)
        own = np.where(values != 0, at[codes.indices], at[codes.indices[:, :1]])
        assert (own == own[:, :1]).all()
    np.testing.assert_array_equal(np.bincount(rows, minlength=B + 1)[:B], needed)


def test_lines_of_several_slots_are_laid_out_alike():
    """As a TPU's form hands them on, with slots that are not used among the others."""
    above, _, wanted = case(2)
    rows, values, latents = (np.asarray(a) for a in (above.rows, above.values, above.indices))
    s, lines = 3, []
    for row in range(B):
        mine = np.flatnonzero(rows == row)
        for start in range(0, len(mine), s):
            lines.append((row, mine[start : start + s]))
    wide, at = np.full((len(lines), s), -np.inf, np.float32), np.zeros((len(lines), s), np.int32)
    for i, (_, mine) in enumerate(lines):
        wide[i, : len(mine)], at[i, : len(mine)] = values[mine, 0], latents[mine, 0]
    of = np.int32([row for row, _ in lines])
    arrays = (jnp.asarray(a) for a in (wide, at, of))
    other = Above(*arrays, jnp.bool_(True))
    codes, fits = laid_out(other, other.values > 0.9, other.values, B, 200)
    assert fits
    np.testing.assert_array_equal(dense(codes), wanted)


def test_too_many_lines_are_told():
    above, keep, wanted = case()
    needed = -(-(wanted != 0).sum(1) // ragged.SLOTS).sum()
    for room in range(0, 5 * ragged.SLOTS, ragged.SLOTS):
        _, fits = laid_out(above, keep, above.values, B, room)
        assert bool(fits) == (room // ragged.SLOTS + B >= needed)
    assert needed > B


def test_sums_over_lines_are_those_of_dense_codes():
    above, keep, wanted = case(1)
    codes, _ = laid_out(above, keep, above.values, B, 200)
    plain, v = DenseCodes(jnp.asarray(wanted)), jnp.linspace(0.5, 2, N)
    W = jnp.asarray(np.random.default_rng(2).normal(size=(N, 5)), jnp.float32)
    for one, other in (
        (sums.mean_sum(codes), sums.mean_sum(plain)),
        (sums.mean_sum(plain), wanted.sum() / B),
        (sums.mean_sum(codes, v), sums.mean_sum(plain, v)),
        (sums.mean_sum(plain, v), (wanted @ np.asarray(v)).mean()),
        (sums.firings(codes, N), sums.firings(plain, N)),
        (sums.l0(codes), sums.l0(plain)),
        (sums.decode_part(codes, W), sums.decode_part(plain, W)),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (24, 4), (64, 2), (32, 1), (33, 1)])
def test_sums_in_parts_miss_nothing(shape):
    x = np.random.default_rng(3).integers(-9, 9, shape)
    np.testing.assert_array_equal(sums.over_rows(jnp.asarray(x)), x.sum(0))
    assert int(sums.count(jnp.asarray(x > 2))) == (x > 2).sum()
