"""encode_above by selection, for TPUs: the largest of each row, and more of rows that have more.

``encode_topk`` holds no scores there and moves no scalars one by one, which TPUs are slow at. Its
values of a row are sorted, so that what lies above is a beginning of them. A row in which all of
them lie above is wide: the wide ones, if there are any, are selected from again, with more of each
(more than 256 of a row are XLA's to sort). What is found is put in order of latents in its row, and
moved by whole lines; where it is laid out anew (``saex.sae.ragged``) slots are moved one by one.
"""

import jax
import jax.numpy as jnp

from saex.kernels import zeros_as
from saex.kernels.encode_topk import encode_topk

SLOTS = 16  # of a line
FIRST, MORE, WIDE = 256, 8, 8  # of each row at most; times as many of one row in WIDE


def encode_above(x, b_pre, W_enc, b_enc, least, room, matmul_dtype):
    """(values, indices, rows, whole). Not whole, too: too many wide rows, or too many of one."""
    b, n = x.shape[0], W_enc.shape[0]
    c = min(n, 2 * room, FIRST)
    weights = b_pre, W_enc, b_enc - least
    chosen: tuple = encode_topk(x, *weights, c, matmul_dtype)
    over, latents = chosen
    wide = ~(over[:, -1] <= 0) if c < n else jnp.zeros((b,), bool)
    used = ~(over <= 0) & ~wide[:, None]

    m = max(1, b // WIDE)
    (of,) = jnp.nonzero(wide, size=m, fill_value=b)
    rows = x.at[of].get(mode="fill", fill_value=0)
    size = min(n, MORE * c)

    def select(rows):
        chosen: tuple = encode_topk(rows, *weights, size, matmul_dtype)
        return chosen[0], chosen[1]

    def nothing(rows):
        return zeros_as((m, size), rows), zeros_as((m, size), rows, jnp.int32)

    more, more_latents = jax.lax.cond(jnp.any(wide), select, nothing, rows)
    real = (of < b)[:, None]
    more_used = ~(more <= 0) & real
    enough = ~jnp.any(more_used[:, -1]) if more.shape[1] < n else True

    found = (over, latents, used), (more, more_latents, more_used)
    lines = [_by_latent(*each, least) for each in found]
    starts = jnp.arange(b) * (lines[0][0].shape[0] // b)
    place = jnp.cumsum(wide, dtype=jnp.int32) - 1
    of_wide = lines[0][0].shape[0] + jnp.minimum(place, m - 1) * (lines[1][0].shape[0] // m)
    counts = jnp.sum(used, axis=1, dtype=jnp.int32)
    counts_wide = jnp.sum(more_used, axis=1, dtype=jnp.int32)[jnp.clip(place, 0, m - 1)]
    needed = -(-jnp.where(wide, counts_wide, counts) // SLOTS)
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    line = jnp.arange(-(-b * room // SLOTS) + b, dtype=jnp.int32)
    row = jnp.searchsorted(ends, line, side="right", method="scan_unrolled").astype(jnp.int32)
    at = jnp.minimum(row, b - 1)
    source = jnp.where(wide, of_wide, starts)[at] + line - (ends - needed)[at]
    values, indices = (jnp.concatenate(a)[source] for a in zip(*lines))
    ours = (line < ends[-1])[:, None]
    whole = (jnp.sum(wide) <= m) & enough & (ends[-1] <= line.shape[0])
    values, indices = jnp.where(ours, values, -jnp.inf), jnp.where(ours, indices, 0)
    return values, indices, jnp.where(ours[:, 0], row, b), whole


def _by_latent(over, latents, used, least):
    """(values, latents) [lines, SLOTS]: used slots of a row first, in rising order of latents."""
    n = least.shape[0]
    room = ((0, 0), (0, -over.shape[1] % SLOTS))
    key, over = jnp.where(used, latents, n), jnp.pad(over, room)
    key, over = jax.lax.sort((jnp.pad(key, room, constant_values=n), over), num_keys=1)
    on = key < n
    latents = jnp.where(on, key, 0)
    values = jnp.where(on, over + least[latents], -jnp.inf)
    return values.reshape(-1, SLOTS), latents.reshape(-1, SLOTS)
