"""Kernels of TPUs and GPUs on drawn shapes, Pallas' interpreted, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.adam import reference as adam_ref
from saex.kernels.encode_topk import pallas_gpu as encode_gpu
from saex.kernels.encode_topk import pallas_tpu as encode_tpu
from saex.kernels.sparse_affine import GRADS
from saex.kernels.sparse_affine import pallas_gpu as affine_gpu
from saex.kernels.sparse_decode import sparse_decode
from saex.kernels.topk import pallas_tpu as topk_tpu
from saex.kernels.topk import xla_gpu as topk_xla
from tests.kernels import oracles
from tests.kernels.oracles import drawn_slots, normal, whole_numbers
from tests.kernels.test_gpu import no_races, one_compilation  # noqa: F401
from tests.kernels.test_tpu import interpreted, small_tiles  # noqa: F401
from tests.kernels.test_tpu_adam import adam_args

# Each draw compiles a kernel anew: two of them in CI, more before a release.
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.parametrize("examples", [2, pytest.param(20, marks=pytest.mark.slow)]),
]
BACKENDS = ["pallas_tpu", "pallas_gpu"]
SEED = st.integers(0, 2**31)
ROWS, WIDTH = st.integers(1, 17), st.integers(1, 140)


def holds(examples, check, *drawn):
    settings(max_examples=examples, deadline=None)(given(*drawn)(check))()


def on(backend, f, *args):
    """f of one device; where Pallas is interpreted, without a race."""
    if backend == "pallas_tpu":
        return interpreted(f, *args)
    out = jax.block_until_ready(jax.jit(lambda *args: f(*args))(*args))
    if backend == "pallas_gpu":
        no_races()
    return out


def same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def close(got, want, atol=1e-4):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["pallas_tpu", "gpu"])
def test_top_k(examples, backend, dtype):
    top_k = {"pallas_tpu": topk_tpu.top_k, "gpu": topk_xla.top_k}[backend]

    def check(kind, b, n, k, seed):
        scores = jnp.asarray(oracles.random_scores(kind, b, n, seed), dtype)
        got = on(backend, lambda scores: top_k(scores, min(k, n)), scores)
        values, order = oracles.top_k(np.asarray(scores.astype(jnp.float32)), min(k, n))
        same((got[0].astype(jnp.float32), got[1]), (values, order))

    holds(examples, check, st.sampled_from(oracles.KINDS), ROWS, st.integers(1, 2500),
          st.integers(1, 40), SEED)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_topk(examples, backend):
    """Whole numbers: exact in bfloat16, full of ties; some latents are at -inf."""
    impl = {"pallas_tpu": encode_tpu, "pallas_gpu": encode_gpu}[backend].encode_topk

    def check(b, d, n, k, seed):
        x, b_pre, W_enc, b_enc = whole_numbers(seed, (b, d), (d,), (n, d), (n,))
        b_enc = b_enc.at[n // 2 :: 3].set(-jnp.inf)
        scores = np.asarray((x - b_pre[None]) @ W_enc.T + b_enc[None])
        encode = lambda *args: impl(*args, min(k, n), "bfloat16")  # noqa: E731
        same(on(backend, encode, x, b_pre, W_enc, b_enc), oracles.top_k(scores, min(k, n)))

    holds(examples, check, ROWS, WIDTH, st.integers(1, 600), st.integers(1, 12), SEED)


LATENTS, SLOTS = st.integers(1, 90), st.integers(1, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_and_its_gradients(examples, backend):
    def check(b, d, n, k, seed):
        values, indices = drawn_slots(b, n, min(k, n), seed)
        rows, g = normal(seed, (n, d), (b, d))

        def pulled(values, rows, g):
            y, pull = jax.vjp(lambda v, w: sparse_decode(v, indices, w, backend), values, rows)
            return y, *pull(g)

        codes = oracles.dense(values, indices, n)
        dv = np.take_along_axis(np.float64(g) @ np.float64(rows).T, np.asarray(indices), axis=1)
        close(on(backend, pulled, values, rows, g), (codes @ rows, dv, codes.T @ g))

    holds(examples, check, ROWS, WIDTH, LATENTS, SLOTS, SEED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_pass(examples, backend):
    def check(b, d, n, k, seed):
        values, indices = drawn_slots(b, n, min(k, n), seed)
        dvalues, g, x, W_dec = normal(seed, values.shape, (b, d), (b, d + 1), (n, d))
        args = values, dvalues, indices, g, x, W_dec
        # Hopper's cuts what hot latents have into pieces: small ones, so that there are some.
        grads = GRADS[backend] if backend == "pallas_tpu" else small_pieces
        close(on(backend, grads, *args), oracles.affine_grads(*args), atol=5e-4)

    holds(examples, check, ROWS, WIDTH, LATENTS, SLOTS, SEED)


def small_pieces(*args):
    return affine_gpu.grads(*args, piece=3)


@pytest.mark.parametrize("unit", [True, False])
def test_adam(examples, unit):
    def check(n, d):
        args = adam_args(n, d)
        close(on("pallas_tpu", adam_tpu.adam, *args, unit), adam_ref.adam(*args, unit))

    holds(examples, check, st.integers(1, 60), st.integers(1, 300))
