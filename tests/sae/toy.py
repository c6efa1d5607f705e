"""Sparse sums of random directions: data whose dictionary is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def directions(features, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(features, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def batch(D, rows, active, seed):
    """`active` of the features in each row, with magnitudes in 0.5..1.5; float32 [rows, d]."""
    rng = np.random.default_rng([seed, 7])
    chosen = np.argpartition(rng.random((rows, len(D))), active, axis=1)[:, :active]
    size = rng.uniform(0.5, 1.5, chosen.shape).astype(np.float32)
    return np.einsum("bk,bkd->bd", size, D[chosen])


def columns(sae, x, seed):
    """A batch of all that the method reads: x, and what the other columns are made of it."""
    rng = np.random.default_rng([seed, 8])
    sites = getattr(sae, "sites", 1)  # side by side, where each one's row is an example
    mix = directions(sae.d_in, sae.d_out, seed=5)
    made = {
        "x": lambda: np.concatenate([x * (1 + i) + i for i in range(sites)], axis=1),
        "y": lambda: np.tanh(x @ mix) + 0.2,
        "complexity": lambda: np.clip(5 + x @ mix[:, 0] + rng.normal(size=len(x)), 0, 10),
        "label": lambda: (x[:, : sae.concepts] > 0.5).astype(np.int8),
        "gradient": lambda: rng.normal(size=x.shape).astype(np.float32),
    }
    return {name: made[name]() for name in sae.columns}


@functools.cache
def _compiled(sae):
    """One program for a dictionary, whatever its numbers."""

    def loss(params, stats, x, hyper):
        return sae.loss(params, stats, {"x": x}, None, jnp.int32(0), hyper)

    return jax.jit(loss)


def loss_of(sae, params, stats, x, **hyper):
    """(loss, Out) of one batch of rows at step 0."""
    return _compiled(sae)(params, stats, jnp.asarray(x), {**sae.hyper(), **hyper})


def grads_of(loss_of, sae, params, stats, *args, **kwargs):
    """Gradients in params of a ``loss_of``."""

    def loss(params):
        return loss_of(sae, params, stats, *args, **kwargs)[0]

    return jax.jit(jax.grad(loss))(params)


def fit(
    sae,
    batches,
    optim,
    mesh,
    steps,
    seed=0,
    change=lambda params: params,
    hyper=None,
    strategy="tp",
):
    """Train on `batches(i)`, rows or batches; returns (params in numpy, metrics as floats).

    The state lies on the mesh as the strategy says, from the first step to the last.
    """
    from saex.train.state import abstract_state, init_state
    from saex.train.step import hyper_arrays, make_step

    with jax.set_mesh(mesh):
        sample = jax.tree.map(jnp.asarray, _named(batches(10**6)))
        tx = optim.transformation()
        state = init_state(sae, tx, jax.random.key(seed), sample, mesh, strategy)
        wanted = abstract_state(sae, tx, mesh, strategy)
        _lies_as(state, wanted)
        state = state.replace(params=change(state.params))
        step, hyper = make_step(sae, optim, steps), hyper or hyper_arrays(sae, optim, steps)
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        history = []
        for i in range(steps):
            rows = jax.device_put(_named(batches(i)), sharding)
            state, metrics = step(state, rows, jax.random.key(seed), hyper)
            history.append(metrics)
        _lies_as(state, wanted)
        assert step._cache_size() == 1, "one program for all steps"
        history = [{k: float(v) for k, v in m.items()} for m in history]
        return jax.device_get(state.params), history


def _lies_as(state, wanted):
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), jax.tree_util.keystr(path)


def _named(batch):
    return batch if isinstance(batch, dict) else {"x": batch}
