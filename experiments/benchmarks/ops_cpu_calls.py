"""The ops that ``ops_cpu.py`` times: what one writes in plain jnp, and what saex does, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import saex_step, zipf_codes, zipf_rows, zipf_scores

from saex.kernels.encode_above import encode_above, room_for
from saex.kernels.encode_topk import encode_topk, pre_activations
from saex.kernels.sparse_affine import GRADS, sparse_affine
from saex.kernels.sparse_decode import DECODE, DOTS, SCATTER, sparse_decode
from saex.kernels.topk import IMPLS
from saex.sae import SparseCodes, TopK, affine, losses, selection
from saex.sae.ragged import laid_out
from saex.train.descent import descend
from saex.train.optim import Optim

HERE_ONLY = ("reference", "cpu")
DEAD = 8  # one latent of so many is dead where AuxK is measured
Calls = dict[str, Callable[[], Any]]


def ops(b: int, d: int, n: int, k: int) -> dict[str, Callable[[], Calls]]:
    """The calls to compare, by op; made when asked for, so that one op's arrays live at a time."""
    return {
        "top_k": lambda: top_k_calls(b, d, n, k),
        "encode": lambda: encode_calls(b, d, n, k),
        "decode": lambda: decode_calls(b, d, n, k),
        "dots": lambda: dots_calls(b, d, n, k),
        "scatter": lambda: scatter_calls(b, d, n, k),
        "top_k + decode": lambda: pair_calls(b, d, n, k),
        "loss and gradients": lambda: gradient_calls(b, d, n, k),
        "backward": lambda: backward_calls(b, d, n, k),
        "AuxK": lambda: aux_calls(b, d, n, k),
        "batch selection": lambda: batch_calls(b, d, n, k),
        "threshold selection": lambda: threshold_calls(b, d, n, k),
        "Adam, unit rows": lambda: adam_calls(d, n),
        "train step": lambda: step_calls(b, d, n, k),
    }


# ------------------------------------------------------------------------------------------ the ops


def top_k_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Selection alone."""
    p = _scores(b, n)
    calls = {"plain": _call(lambda p: tuple(jax.lax.top_k(p, k)), p)}
    return calls | {"cpu": _call(lambda p: IMPLS["cpu"](p, k), p)}


def encode_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder and selection, without gradients."""
    x, w = _rows(b, d), _weights(d, n)

    def plain(x, w):
        return jax.lax.top_k(pre_activations(x, w["b_dec"], w["W_enc"], w["b_enc"]), k)

    def ours(x, w):
        return encode_topk(x, w["b_dec"], w["W_enc"], w["b_enc"], k)

    return {"plain": _call(plain, x, w), "cpu": _call(ours, x, w)}


def decode_calls(b: int, d: int, n: int, k: int) -> Calls:
    """[b, k] codes to [b, d] rows."""
    (values, indices), W = _codes(b, n, k), _normal(1, n, d)
    calls = {"plain": _call(lambda v, i, W: _dense(v, i, n) @ W, values, indices, W)}
    return calls | {
        name: _call(f, values, indices, W) for name, f in DECODE.items() if name in HERE_ONLY
    }


def dots_calls(b: int, d: int, n: int, k: int) -> Calls:
    """The gradient of the values."""
    (_, indices), g, W = _codes(b, n, k), _rows(b, d), _normal(1, n, d)
    plain = _call(lambda i, g, W: jnp.take_along_axis(g @ W.T, i, axis=1), indices, g, W)
    return {"plain": plain} | {
        name: _call(f, indices, g, W) for name, f in DOTS.items() if name in HERE_ONLY
    }


def scatter_calls(b: int, d: int, n: int, k: int) -> Calls:
    """The gradient of the rows."""
    (values, indices), g = _codes(b, n, k), _rows(b, d)
    calls = {"plain": _call(lambda v, i, g: _dense(v, i, n).T @ g, values, indices, g)}
    for name, f in ((i, SCATTER[i]) for i in HERE_ONLY):
        calls[name] = _call(lambda v, i, g, f=f: f(v, i, g, n), values, indices, g)
    return calls


def backward_calls(b: int, d: int, n: int, k: int) -> Calls:
    """``sparse_affine``'s own: gradients of decoder, encoder and its bias on a support."""
    (values, indices), dvalues = _codes(b, n, k), 0.01 * _normal(3, b, k)
    x, g, W = _rows(b, d), _normal(4, b, d) / d, _weights(d, n)["W_dec"]

    def plain(values, dvalues, indices, g, x, W):
        f = _dense(values, indices, n)
        dz = jnp.where(f != 0, g @ W.T + _dense(dvalues, indices, n), 0)
        return f.T @ g, dz.T @ x, jnp.sum(dz, axis=0)

    arrays = values, dvalues, indices, g, x, W
    ours = {name: _call(GRADS[name], *arrays) for name in HERE_ONLY}
    return {"plain": _call(plain, *arrays), **ours}


def aux_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Loss and gradients on a support with AuxK, one in ``DEAD`` latents dead; no selection."""
    (_, indices), x, w = _codes(b, n, k), _rows(b, d), _weights(d, n)
    values = jnp.take_along_axis(jax.nn.relu(affine.scores(w, x)), indices, axis=1)
    dead, k_aux = jnp.arange(n) % DEAD == 0, affine.latents_for_aux(None, d, n)

    def plain(w, x):
        z = jax.nn.relu(pre_activations(x, w["b_dec"], w["W_enc"], w["b_enc"]))
        chosen = _dense(values, indices, n) != 0
        residual = x - jnp.where(chosen, z, 0) @ w["W_dec"] - w["b_dec"][None]
        best, slots = jax.lax.top_k(jnp.where(dead[None], z, 0), k_aux)
        y_dead = _dense(best, slots, n) @ w["W_dec"]
        return jnp.mean(jnp.square(residual)) + losses.aux_k(residual, y_dead, dead) / 32

    def ours(w, x):
        codes = SparseCodes(values, indices)
        _, y, aux, _ = affine.decode_aux(w, x, codes, dead, 1 / 32, k_aux)
        return jnp.mean(jnp.square(x - y)) + aux / 32

    grads = {name: jax.value_and_grad(f) for name, f in (("plain", plain), ("cpu", ours))}
    return {name: _call(f, w, x) for name, f in grads.items()}


def batch_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder, and what is among a batch's b k largest (BatchTopK), without gradients."""
    x, w = _rows(b, d), _weights(d, n)
    last = selection.batch_cut(min(b, 256) * k, affine.scores(w, x[:256]))
    size = room_for(None, n, k)

    def plain(w, x):
        p = jax.nn.relu(affine.scores(w, x))
        return jnp.where(p >= jax.lax.top_k(p.ravel(), b * k)[0][-1], p, 0)

    def ours(w, x):
        if not size:  # as the method decides
            p = jax.nn.relu(affine.scores(w, x))
            return jnp.where(p >= selection.batch_cut(b * k, p), p, 0)
        least = jnp.broadcast_to(selection.BELOW_LAST * last, (n,))
        above = encode_above(x, *affine.encoder(w), least, size)
        values = jax.nn.relu(above.values)
        keep = (values >= selection.batch_cut(b * k, values)) & (values > 0)
        return laid_out(above, keep, values, b, b * size)

    return {"plain": _call(plain, w, x), "cpu": _call(ours, w, x)}


def threshold_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Encoder, and what is above one threshold a latent, k of a row (JumpReLU)."""
    x, w = _rows(b, d), _weights(d, n)
    cut = jnp.quantile(affine.scores(w, x[:256]), 1 - k / n)
    theta, size = jnp.full((n,), cut), room_for(None, n)

    def plain(w, x):
        p = affine.scores(w, x)
        return jnp.where(p > theta[None], p, 0)

    def ours(w, x):
        if not size:
            return plain(w, x)
        above = encode_above(x, *affine.encoder(w), theta, size)
        return laid_out(above, above.values != -jnp.inf, above.values, b, b * size)

    return {"plain": _call(plain, w, x), "cpu": _call(ours, w, x)}


def adam_calls(d: int, n: int) -> Calls:
    """Adam in place on encoder and decoder, whose rows keep norm 1, of tangent gradients."""
    w = {name: _weights(d, n)[name] for name in ("W_enc", "W_dec")}
    grads, tx = {"W_enc": _normal(8, n, d), "W_dec": _normal(9, n, d)}, Optim().transformation()

    def plain(w, state, grads):
        along = jnp.sum(grads["W_dec"] * w["W_dec"], axis=1, keepdims=True)
        grads = {**grads, "W_dec": grads["W_dec"] - along * w["W_dec"]}
        updates, state = tx.update(grads, state, w)
        w = jax.tree.map(lambda p, u: p - 1e-4 * u, w, updates)
        norms = jnp.linalg.norm(w["W_dec"], axis=1, keepdims=True)
        return {**w, "W_dec": w["W_dec"] / norms}, state

    def ours(w, state, grads):
        return descend(Optim(), ("W_dec",), w, grads, state, 1e-4)[:2]

    def stepping(f):
        kept = [jax.tree.map(jnp.copy, w), tx.init(w)]
        compiled = jax.jit(f, donate_argnums=(0, 1))

        def call():
            kept[:] = compiled(*kept, grads)
            return kept

        return call

    return {"plain": stepping(plain), "cpu": stepping(ours)}


def pair_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Selection and decode as one program: what an evaluation does after the encoder's matmul."""
    p, W = _scores(b, n), _normal(1, n, d)

    def plain(p, W):
        values, indices = jax.lax.top_k(p, k)
        return _dense(jax.nn.relu(values), indices, n) @ W

    def ours(p, W):
        values, indices = IMPLS["cpu"](p, k)
        return sparse_decode(jax.nn.relu(values), indices, W, "cpu")

    return {"plain": _call(plain, p, W), "cpu": _call(ours, p, W)}


def gradient_calls(b: int, d: int, n: int, k: int) -> Calls:
    """Mean squared error of a TopK SAE and its gradients in all four weights."""
    x, weights = _rows(b, d), _weights(d, n)

    def ours(w, x):
        held = jax.lax.stop_gradient(w)
        values, indices = encode_topk(x, held["b_dec"], held["W_enc"], held["b_enc"], k)
        arrays = (x, w["b_dec"], w["W_enc"], w["b_enc"], w["W_dec"])
        _, y = sparse_affine(*arrays, jax.nn.relu(values), indices)
        return jnp.mean(jnp.square(x - y - w["b_dec"][None]))

    return {
        "plain": _call(jax.value_and_grad(lambda w, x: _plain_loss(w, x, k)), weights, x),
        "cpu": _call(jax.value_and_grad(ours), weights, x),
    }


def step_calls(b: int, d: int, n: int, k: int) -> Calls:
    """A whole update: saex's, with AuxK (nothing dead), firing counts and unit rows, against
    loss, gradients, optax.adam and unit rows.
    """
    x = _rows(b, d)
    return {
        "plain": _plain_step(x, n, k),
        "cpu": saex_step(np.asarray(x), TopK(x.shape[1], n, k=k)),
    }


def _plain_step(x: jax.Array, n: int, k: int) -> Callable[[], Any]:
    tx = optax.adam(1e-4)

    def step(weights, opt_state, x):
        loss, grads = jax.value_and_grad(lambda w: _plain_loss(w, x, k))(weights)
        updates, opt_state = tx.update(grads, opt_state)
        weights = optax.apply_updates(weights, updates)
        W = weights["W_dec"]
        norms = jnp.linalg.norm(W, axis=1, keepdims=True)
        return {**weights, "W_dec": W / norms}, opt_state, loss

    weights = _weights(x.shape[1], n)
    state = [weights, tx.init(weights), None]
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def call():
        state[:] = compiled(state[0], state[1], x)
        return state

    return call


# ----------------------------------------------------------------------------------------- the rest


def _plain_loss(w: dict[str, jax.Array], x: jax.Array, k: int) -> jax.Array:
    p = pre_activations(x, w["b_dec"], w["W_enc"], w["b_enc"])
    values, indices = jax.lax.top_k(p, k)
    y = _dense(jax.nn.relu(values), indices, p.shape[1]) @ w["W_dec"] + w["b_dec"][None]
    return jnp.mean(jnp.square(x - y))


def _dense(values: jax.Array, indices: jax.Array, n: int) -> jax.Array:
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], n)).at[rows, indices].set(values)


def _call(f: Callable, *args: Any) -> Callable[[], Any]:
    compiled = jax.jit(f)
    return lambda: compiled(*args)


def _weights(d: int, n: int) -> dict[str, jax.Array]:
    W = _normal(7, n, d) / d**0.5
    return {"W_enc": W, "W_dec": W + 0, "b_enc": jnp.zeros(n), "b_dec": jnp.zeros(d)}


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _rows(b: int, d: int) -> jax.Array:
    return jnp.asarray(zipf_rows(b, d))


def _scores(b: int, n: int) -> jax.Array:
    """1,024 rows of heavy-tailed scores, repeated."""
    few = zipf_scores(min(b, 1024), n)
    return jnp.tile(jnp.asarray(few), (b // len(few), 1))


def _codes(b: int, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    values, indices = zipf_codes(b, n, k)
    return jnp.asarray(values), jnp.asarray(indices)
