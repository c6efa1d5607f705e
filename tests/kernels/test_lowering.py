"""What the GPU's backends are lowered to: no scatter of floats, whose order a GPU does not fix."""

import jax
import jax.numpy as jnp
import pytest

from saex.kernels import encode_topk, sparse_affine, sparse_decode
from saex.kernels.encode_topk import chosen_scores
from saex.sae.jump_relu import JumpReLU
from saex.sae.matching_pursuit import MatchingPursuit
from saex.sae.topk import TopK


def float_scatters(f, *args):
    """Types of what is scattered into, in the program of ``f`` for CUDA."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    parts = text.split('"stablehlo.scatter"(')[1:]
    types = [part.split("}) : (")[1].split(",")[0] for part in parts]
    return [t for t in types if t.endswith(("xf32>", "xbf16>"))]


@pytest.fixture
def for_gpu(monkeypatch):
    monkeypatch.setattr("saex.kernels.target", lambda: "gpu")


def arrays(*shapes, dtype="float32"):
    return [jax.ShapeDtypeStruct(s, dtype) for s in shapes]


def loss_and_arguments(sae):
    """The gradient of a loss and what it takes, from shapes alone."""
    rows = {"x": jnp.ones((32, sae.d_in))}
    params, stats = jax.eval_shape(sae.init, jax.random.key(0), rows)
    hyper = {name: jnp.float32(v) for name, v in {**sae.hyper(), "steps": 10}.items()}

    def loss(params, stats, rows):
        return sae.loss(params, stats, rows, None, jnp.int32(0), hyper)[0]

    return jax.grad(loss), (params, stats, jax.eval_shape(lambda: rows))


@pytest.mark.parametrize(
    "sae",
    [  # sizes of their own: a loss that was traced before keeps its backends
        JumpReLU(7, 272, capacity=9),
        TopK(7, 272, 9, aux_coefficient=0.0),
        MatchingPursuit(7, 272, 9, aux_coefficient=0.0),
    ],
    ids=lambda sae: type(sae).__name__,
)
def test_a_loss_and_its_gradients_scatter_no_floats_on_a_gpu(sae, for_gpu):
    f, args = loss_and_arguments(sae)
    assert not float_scatters(f, *args)


def test_the_search_for_scatters_finds_those_of_a_cpu():
    f, args = loss_and_arguments(JumpReLU(7, 280, capacity=9))
    assert "tensor<280xf32>" in float_scatters(f, *args)


def test_sums_over_latents_scatter_no_floats_on_a_gpu(for_gpu):
    b, d, n, k, impl = 30, 5, 70, 3, None
    values, (indices,) = arrays((b, k)), arrays((b, k), dtype="int32")
    weights = arrays((b, d), (d,), (n, d), (n,))

    def chosen(values, indices, *weights):
        return jnp.sum(jnp.sin(chosen_scores(*weights, values, indices, jnp.arange(b))))

    def encoded(*weights):
        return jnp.sum(jnp.sin(encode_topk.encode_topk(*weights, k, "float32", impl)[0]))

    def affine(values, indices, W_dec, *weights):
        return jnp.sum(sparse_affine.sparse_affine(*weights, W_dec, values, indices, impl)[1] ** 2)

    def looked_up(scalars, indices):
        return jnp.sum(jnp.sin(sparse_decode.sparse_take(scalars, indices, impl)))

    assert not float_scatters(jax.grad(chosen, (2, 3, 4, 5)), *values, indices, *weights)
    assert not float_scatters(jax.grad(encoded, (0, 1, 2, 3)), *weights)
    W_dec = arrays((n, d))
    assert not float_scatters(jax.grad(affine, (2, 3, 4, 5, 6)), *values, indices, *W_dec, *weights)
    assert not float_scatters(jax.grad(looked_up), *arrays((n,)), indices)
