"""Small stores, a small random transformer and dictionaries whose scores are known."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from saex.data import Column, Store, StoreWriter
from saex.models.transformer import Transformer
from saex.sae import DenseCodes, SparseCodes

SITE = "blocks.0.resid_post"


@dataclasses.dataclass(frozen=True)
class Affine:
    """xhat = gain * x + params["offset"]: identity, zero, shrunk and constant reconstructions."""

    d_in: int
    gain: float = 1.0
    codes: ClassVar[type] = DenseCodes

    @property
    def n(self):
        return self.d_in

    d_out = n

    def encode(self, params, x):
        return DenseCodes(x.astype(jnp.float32))

    def decode(self, params, codes, context=None):
        return self.gain * codes.values + params["offset"][None]


@dataclasses.dataclass(frozen=True)
class LargestEntries:
    """Keeps the k entries of largest magnitude, as sparse codes in the standard basis."""

    d_in: int
    k: int
    codes: ClassVar[type] = SparseCodes

    @property
    def n(self):
        return self.d_in

    d_out = n

    def encode(self, params, x):
        _, indices = jax.lax.top_k(jnp.abs(x.astype(jnp.float32)), self.k)
        return SparseCodes(jnp.take_along_axis(x, indices, axis=1).astype(jnp.float32), indices)

    def decode(self, params, codes, context=None):
        return codes.dense(self.n)


def constant(value):
    """A dictionary and params that predict one vector for every row."""
    return Affine(len(value), 0.0), {"offset": jnp.asarray(value, jnp.float32)}


def write_store(path, **columns):
    """A finished store of these columns."""
    shapes = {n: Column(v.shape[1:], str(v.dtype)) for n, v in columns.items()}
    with StoreWriter(path, shapes, chunk_rows=64) as writer:
        writer.append(columns)
        writer.commit({"rows": len(next(iter(columns.values())))})
        writer.finish()
    return Store.open(path)


def random_model(seed=0, **sizes):
    """A transformer whose every parameter is random, so that everything matters."""
    sizes = {"vocab": 19, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 32} | sizes
    model = Transformer(context=12, **sizes)
    shapes, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    leaves = [jax.random.normal(k, s.shape) * s.shape[-1] ** -0.5 for k, s in zip(keys, shapes)]
    return model, jax.tree.unflatten(tree, leaves)


def harvested(model, params, contexts, tmp_path, site=SITE):
    """The store of a model's activations on contexts, padding left out."""
    run = jax.jit(lambda tokens: model.run(params, tokens, taps=(site,), stop_at=site)[1])
    taps = run(jnp.asarray(contexts.tokens))
    m, t = contexts.tokens.shape
    real = np.arange(t)[None] < contexts.lengths[:, None]
    columns = {
        site: np.asarray(taps[site], np.float32)[real],
        "tokens": contexts.tokens[real].astype(np.int32),
        "document": np.repeat(np.arange(m, dtype=np.int32), t).reshape(m, t)[real],
        "position": np.tile(np.arange(t, dtype=np.int32), (m, 1))[real],
    }
    return write_store(tmp_path / "store", **columns)
