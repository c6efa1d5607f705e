"""The ops that ``gpu_parts.py`` times: saex's backends for GPUs and XLA's own forms, by name."""

from collections.abc import Callable
from typing import Any

import gpu_questions
import jax
import jax.numpy as jnp
from measure import zipf_codes, zipf_rows

from saex.kernels import encode_topk, sparse_affine, sparse_decode, topk
from saex.kernels.encode_above import encode_above
from saex.kernels.sparse_affine.dead import listed
from saex.sae import selection
from saex.sae.ragged import laid_out
from saex.train.descent import descend
from saex.train.optim import Optim

TABLES = {
    "encode": encode_topk.IMPLS,
    "decode": sparse_decode.DECODE,
    "dots": sparse_decode.DOTS,
    "scatter": sparse_decode.SCATTER,
    "backward": sparse_affine.GRADS,
}
DEAD = 8  # one latent of so many is dead where AuxK is measured
Calls = dict[str, Callable[[], Any]]


def runs_here(op: str, backend: str) -> bool:
    """All on a GPU; on CPU the kernel of several warpgroups is left out: interpreting it can hang
    where there are fewer cores than warpgroups.
    """
    return jax.default_backend() != "cpu" or (op, backend) != ("encode", "pallas_gpu")


def jitted(f: Callable, *args: Any) -> Callable[[], Any]:
    """A call of the compiled function on the same arrays."""
    compiled = jax.jit(f)
    return lambda: compiled(*args)


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal float32."""
    return jax.random.normal(jax.random.key(seed), shape)


def each(op: str, *args: Any, **static: Any) -> Calls:
    """Calls of an op's backends for GPUs on the same arrays."""
    return {
        name: jitted(lambda *a, f=TABLES[op][name]: f(*a, *static.values()), *args)
        for name in ("gpu", "pallas_gpu")
        if runs_here(op, name)
    }


def weights(d: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(b_pre, W_enc, b_enc) of a random encoder."""
    return jnp.zeros(d), normal(6, n, d) / d**0.5, normal(8, n) / 100


def scores(b: int, d: int, n: int) -> jax.Array:
    """[b, n]: heavy-tailed rows through a random encoder."""
    b_pre, W, b_enc = weights(d, n)
    x = jnp.asarray(zipf_rows(b, d))
    return jax.jit(encode_topk.pre_activations, static_argnums=4)(x, b_pre, W, b_enc, "bfloat16")


def top_k(b: int, d: int, n: int, k: int) -> Calls:
    """Selection alone."""
    p = scores(b, d, n)
    return {
        "lax.top_k": jitted(lambda p: tuple(jax.lax.top_k(p, k)), p),
        "gpu": jitted(lambda p: topk.IMPLS["gpu"](p, k), p),
    }


def encode(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder and selection."""
    x, (_, W, b_enc) = jnp.asarray(zipf_rows(b, d)), weights(d, n)
    calls = each("encode", x, x[0], W, b_enc, k=k, dtype="bfloat16")
    return {**calls, "matmul alone": jitted(gpu_questions.matmul, x, W)}


def on_codes(op: str) -> Callable[[int, int, int, int], Calls]:
    """The op on Zipf-distributed codes."""

    def calls(b: int, d: int, n: int, k: int) -> Calls:
        values, indices = map(jnp.asarray, zipf_codes(b, n, k))
        g, W = normal(4, b, d), normal(6, n, d) / d**0.5
        if op == "decode":
            return each(op, values, indices, W)
        if op == "dots":
            return each(op, indices, g, W)
        if op == "scatter":
            return each(op, values, indices, g, n=n)
        return each(op, values, normal(3, b, k), indices, g, jnp.asarray(zipf_rows(b, d)), W)

    return calls


def aux(b: int, d: int, n: int, k: int) -> Calls:
    """Decode and its gradients with one in ``DEAD`` latents dead, all of which may serve a row;
    and with none.
    """
    x, (b_pre, W, b_enc) = jnp.asarray(zipf_rows(b, d)), weights(d, n)
    values, indices = map(jnp.asarray, zipf_codes(b, n, k))

    def loss(dead, W_enc, W_dec):
        args = x, b_pre, W_enc, b_enc, W_dec, values, indices, listed(dead), jnp.zeros((b, 1))
        _, y, y_dead, _ = sparse_affine.sparse_affine_aux(*args, "bfloat16")
        return jnp.mean(jnp.square(x - y)) + jnp.mean(jnp.square(x - y_dead))

    grads = jax.value_and_grad(loss, argnums=(1, 2))
    dead = jnp.arange(n) % DEAD == 0
    return {"gpu": jitted(grads, dead, W, W), "nothing dead": jitted(grads, dead & False, W, W)}


def batch(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder, and what is among a batch's b k largest (BatchTopK), sparsely and densely."""
    x, w = jnp.asarray(zipf_rows(b, d)), weights(d, n)
    p = jax.nn.relu(encode_topk.pre_activations(x[:256], *w, "bfloat16"))
    least = jnp.full((n,), selection.BELOW_LAST * selection.batch_cut(min(b, 256) * k, p))

    def sparse(x, *w):
        above = encode_above(x, *w, least, 2 * k, "bfloat16")
        values = jax.nn.relu(above.values)
        keep = (values >= selection.batch_cut(b * k, values)) & (values > 0)
        return laid_out(above, keep, values, b, 2 * b * k)

    def dense(x, *w):
        p = jax.nn.relu(encode_topk.pre_activations(x, *w, "bfloat16"))
        return jnp.where(p >= selection.batch_cut(b * k, p), p, 0)

    return {"sparse": jitted(sparse, x, *w), "dense": jitted(dense, x, *w)}


def threshold(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder, and what is above a threshold (JumpReLU; k of a row on average)."""
    x, (b_pre, W, b_enc) = jnp.asarray(zipf_rows(b, d)), weights(d, n)
    theta = jnp.full((n,), jnp.quantile(scores(min(b, 256), d, n), 1 - k / n))

    def sparse(x, W, theta):
        above = encode_above(x, b_pre, W, b_enc, theta, min(4 * k, n), "bfloat16")
        return laid_out(above, above.values != -jnp.inf, above.values, b, b * min(4 * k, n))

    def dense(x, W, theta):
        p = encode_topk.pre_activations(x, b_pre, W, b_enc, "bfloat16")
        return jnp.where(p > theta[None], p, 0)

    arrays = x, W, theta
    return {"sparse": jitted(sparse, *arrays), "dense": jitted(dense, *arrays)}


def adam(b: int, d: int, n: int, k: int) -> Calls:
    """In place, on encoder and decoder; with unit rows and tangent gradients, and without."""
    return {"gpu": _stepping(("W_dec",), d, n), "no unit rows": _stepping((), d, n)}


def _stepping(units: tuple[str, ...], d: int, n: int) -> Callable[[], Any]:
    grads = {"W_enc": normal(8, n, d), "W_dec": normal(9, n, d)}
    w = {name: normal(seed, n, d) / d**0.5 for seed, name in enumerate(grads)}
    kept = [w, Optim().transformation().init(w)]

    def update(w, state, grads):
        return descend(Optim(), units, w, grads, state, 1e-4)[:2]

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def call():
        kept[:] = compiled(*kept, grads)
        return kept

    return call


OPS = {"top_k": top_k, "encode": encode}
OPS |= {op: on_codes(op) for op in ("decode", "dots", "scatter", "backward")}
OPS |= {"AuxK": aux, "batch selection": batch, "threshold selection": threshold, "Adam": adam}
