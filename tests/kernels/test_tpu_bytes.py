"""Bytes that the TPU kernels move, counted: walks over their grids against their ``hbm_bytes``."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from saex.cost import terms
from saex.cost.ops import of_op
from saex.kernels.adam import Scalars
from saex.kernels.adam import pallas_tpu as adam_tpu
from saex.kernels.encode_topk import pallas_tpu as encode_tpu
from saex.kernels.sparse_affine import pallas_tpu as affine_tpu
from saex.kernels.sparse_decode import pallas_tpu as decode_tpu
from saex.kernels.sparse_decode import pallas_tpu_latents as latents_tpu
from saex.kernels.topk import pallas_tpu as topk_tpu
from saex.sae import TopK
from saex.sharding import MeshConfig

B, D, N, K = 1024, 256, 8192, 32
RATIO = 1.2


class Walked:
    """Stands where ``pl.pallas_call`` does: computes zeros, and counts what its blocks bring.

    A block is fetched, or written, when its place is not that of the grid's step before, as Pallas
    pipelines do. Operands that stay in HBM are what the kernel itself copies from.
    """

    def __init__(self):
        self.bytes, self.estimate, self.scalars = 0, 0, ()

    def __call__(self, kernel, *, out_shape, cost_estimate, grid=(), grid_spec=None, **specs):
        self.estimate += cost_estimate.bytes_accessed
        scalars = 0
        if grid_spec is not None:
            grid, scalars = grid_spec.grid, grid_spec.num_scalar_prefetch
            specs = {"in_specs": grid_spec.in_specs, "out_specs": grid_spec.out_specs}
        several = isinstance(out_shape, list | tuple)
        out_specs = specs["out_specs"] if several else [specs["out_specs"]]
        shapes = out_shape if several else [out_shape]

        def call(*operands):
            self.scalars = operands[:scalars]
            blocks = [*zip(specs["in_specs"], operands[scalars:]), *zip(out_specs, shapes)]
            for spec, array in blocks:
                self.bytes += self._moved(spec, array, grid)
            zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
            return zeros if several else zeros[0]

        return call

    def _moved(self, spec, array, grid):
        if spec.memory_space is pl.ANY:
            return 0
        if spec.block_shape is None:
            return array.size * array.dtype.itemsize
        steps = np.meshgrid(*(np.arange(size) for size in grid), indexing="ij")
        places = jax.vmap(lambda *at: jnp.stack(spec.index_map(*at, *self.scalars)))
        places = places(*(s.reshape(-1) for s in steps))
        moves = 1 + int(np.any(np.diff(np.asarray(places), axis=0), axis=1).sum())
        return moves * math.prod(spec.block_shape) * array.dtype.itemsize


@pytest.fixture
def walked(monkeypatch):
    found = Walked()
    monkeypatch.setattr(pl, "pallas_call", found)
    return found


def drawn(n=N):
    """Values and latents of B rows, some latents far more often than others."""
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(B, n)) - np.log(np.arange(1, n + 1))
    indices = np.argsort(-scores, axis=1)[:, :K].astype(np.int32)
    return jnp.ones((B, K)), jnp.asarray(indices)


def floor(name):
    """Bytes that a step's term has on one device."""
    of_step = terms.of_step(TopK(d_in=D, n=N, k=K), B, MeshConfig())
    return next(term.bytes for term in of_step if term.name == name)


def close(found, model):
    assert model / RATIO <= found <= RATIO * model, (found, model)


def test_top_k(walked):
    topk_tpu.top_k(jnp.zeros((B, N)), K)
    model = topk_tpu.hbm_bytes(B, N, K, 4)
    close(walked.bytes, model)
    close(model, of_op("top_k", B, D, N, K)[0].bytes)
    assert walked.estimate == model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_topk(walked, dtype):
    """The weights come once for each block of rows: the same number of times that the floor says
    where the batch is a block.
    """
    for b in (B, 256):
        walked.bytes = walked.estimate = 0
        zeros = jnp.zeros((b, D)), jnp.zeros(D), jnp.zeros((N, D)), jnp.zeros(N)
        encode_tpu.encode_topk(*zeros, K, dtype)
        size = jnp.dtype(dtype).itemsize
        assert walked.estimate == encode_tpu.hbm_bytes(b, D, N, K, size)
        close(walked.bytes, walked.estimate)
    close(walked.bytes, of_op("encode", b, D, N, K, dtype)[0].bytes)


def test_decode_and_dots(walked):
    values, indices = drawn()
    zeros = jnp.zeros((N, D))
    model = decode_tpu.hbm_bytes(B, K, D)
    close(model, floor("decode"))
    for call in (
        lambda: decode_tpu.decode(values, indices, zeros),
        lambda: decode_tpu.dots(indices, jnp.zeros((B, D)), zeros),
    ):
        walked.bytes = walked.estimate = 0
        call()
        copied = 4 * B * K * D  # a copy for each slot in use, which here are all
        close(walked.bytes + copied, model)
        assert walked.estimate == model


def test_sums_over_latents(walked):
    """Tiles of latents go out once though several chunks of slots touch them."""
    values, indices = drawn()
    latents_tpu.scatter(values, indices, jnp.zeros((B, D)), N)
    close(walked.bytes + copied(walked, D), latents_tpu.hbm_bytes(B * K, D, N * D, 1))
    close(walked.estimate, latents_tpu.hbm_bytes(B * K, D, N * D, 1))


def test_gradients(walked):
    values, indices = drawn()
    rows = jnp.zeros((B, D))
    affine_tpu.grads(values, values, indices, rows, rows, jnp.zeros((N, D)))
    model = latents_tpu.hbm_bytes(B * K, 2 * D, 3 * N * D, 2)
    close(walked.bytes + copied(walked, 2 * D), model)
    close(walked.estimate, model)
    close(model, floor("backward"))


def copied(walked, width):
    """Bytes of the rows that the kernel fetches by itself, a chunk whenever its number goes up."""
    _, chunk, total = walked.scalars
    chunks = len(list(itertools.groupby(np.asarray(chunk)[: int(total[0])].tolist())))
    return 4 * chunks * latents_tpu.CHUNK * width


def test_adam(walked):
    arrays = [jnp.zeros((N, D))] * 4
    scalars = Scalars(*map(jnp.float32, (0.1, 0.2, 0.003, 0.7)))
    adam_tpu.adam(*arrays, scalars, (0.9, 0.999), 1e-8, True)
    assert walked.estimate == adam_tpu.hbm_bytes(N, D)
    close(walked.bytes, walked.estimate)
    close(2 * walked.bytes, of_op("adam", B, D, N, K)[0].bytes)  # of one of two matrices
