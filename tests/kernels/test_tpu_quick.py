"""One small run of each TPU kernel, interpreted; the rest is in test_tpu.py, a stage of its own."""

import jax.numpy as jnp
import numpy as np

from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.adam import reference as adam_ref
from saex.kernels.encode_topk import pallas_tpu as encode_tpu
from saex.kernels.sparse_affine import pallas_tpu as affine_tpu
from saex.kernels.sparse_decode import pallas_tpu as decode_tpu
from saex.kernels.topk import pallas_tpu as topk_tpu
from tests.kernels import oracles
from tests.kernels.test_tpu import close, interpreted, normal, small_tiles  # noqa: F401
from tests.kernels.test_tpu_adam import adam_args


def test_top_k():
    scores = oracles.random_scores("ties", 3, 200)
    got = interpreted(topk_tpu.top_k, jnp.asarray(scores), 3)
    for one, other in zip(got, oracles.top_k(scores, 3)):
        np.testing.assert_array_equal(one, other)


def test_encode_topk():
    x, b_pre, W_enc, b_enc = oracles.whole_numbers(1, (5, 6), (6,), (40, 6), (40,))
    expected, order = oracles.top_k(np.asarray((x - b_pre[None]) @ W_enc.T + b_enc[None]), 3)
    values, indices = interpreted(encode_tpu.encode_topk, x, b_pre, W_enc, b_enc, 3)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(indices, order)


def test_decode_and_dots():
    values, indices = oracles.drawn_slots(3, 20, 4, 2)
    rows, g = normal(3, (20, 6), (3, 6))
    y = interpreted(decode_tpu.decode, values, indices, rows)
    np.testing.assert_allclose(y, oracles.dense(values, indices, 20) @ rows, atol=1e-5)
    dv = interpreted(decode_tpu.dots, indices, g, rows)
    expected = np.take_along_axis(np.asarray(g @ rows.T), np.asarray(indices), axis=1)
    np.testing.assert_allclose(dv, expected, atol=1e-5)


def test_gradients():
    values, indices = oracles.drawn_slots(6, 20, 3, 4)
    dvalues, g, x, W_dec = normal(5, (6, 3), (6, 5), (6, 4), (20, 5))
    args = values, dvalues, indices, g, x, W_dec
    got = interpreted(affine_tpu.grads, *args)
    for one, other in zip(got, oracles.affine_grads(*args), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_adam():
    args = adam_args(9, 5)
    close(interpreted(adam_tpu.adam, *args, True), adam_ref.adam(*args, True), atol=1e-4)
