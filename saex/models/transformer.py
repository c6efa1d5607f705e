"""A small decoder-only transformer with named sites that can be read (taps) and changed (edits).

Rotary positions, pre-norm (RMSNorm without bias), normalised queries and keys, GELU MLP, untied
unembedding. Parameters are a nested dict of fp32 arrays; the dataclass owns none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

BOS = 256
PARTS = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
EPSILON = 1e-6
Tokens = Integer[Array | np.ndarray, "b t"]


@flax.struct.dataclass
class Edit:
    """A change of one site: x becomes `fn(x, *args)`.

    fn: hashable callable fn(x [b, t, d], *args) -> [b, t, d]; it is static, another one recompiles.
    args: tuple of pytrees, traced: new values of the same shapes do not recompile.
    """

    fn: Callable = flax.struct.field(pytree_node=False)
    args: Any = ()


def encode(text: str) -> np.ndarray:
    """Text to token ids, uint8 [t]: its UTF-8 bytes (BOS is not added)."""
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def decode(ids: Iterable) -> str:
    """Token ids to text; ids that are no byte (BOS) are left out, broken UTF-8 becomes U+FFFD."""
    return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Hyper-parameters of the model; `d_model` must be a multiple of 2 * `n_heads`.

    matmul: type of matmul inputs, 'float32' or 'bfloat16'; sums and all else are fp32.
    """

    vocab: int = 257
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 1024
    context: int = 256
    matmul: str = "float32"

    def __post_init__(self):
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} is no multiple of 2 * n_heads={2 * self.n_heads}: "
                "rotary positions need heads of even width"
            )
        if self.matmul not in ("float32", "bfloat16"):
            raise ValueError(f"matmul={self.matmul!r}: expected 'float32' or 'bfloat16'")

    @property
    def sites(self) -> dict[str, int]:
        """Site name -> width, in the order in which the model computes them."""
        return {f"blocks.{i}.{p}": self.d_model for i in range(self.n_layers) for p in PARTS}

    def init(self, key: jax.Array) -> dict:
        """Random parameters (fp32); projections into the residual stream start at zero."""
        d, m, v = self.d_model, self.d_mlp, self.vocab
        keys = iter(jax.random.split(key, 1 + 4 * self.n_layers))

        def normal(rows, columns):
            return jax.random.normal(next(keys), (rows, columns)) / math.sqrt(rows)

        def block():
            attention = {"q": normal(d, d), "k": normal(d, d), "v": normal(d, d)}
            mlp = {"in": normal(d, m), "out": jnp.zeros((m, d))}
            return {
                "attn_norm": jnp.ones(d),
                "attn": attention | {"o": jnp.zeros((d, d))},
                "mlp_norm": jnp.ones(d),
                "mlp": mlp,
            }

        return {
            "embed": jax.random.normal(next(keys), (v, d)) * 0.1,
            "blocks": {str(i): block() for i in range(self.n_layers)},
            "final_norm": jnp.ones(d),
            "unembed": jnp.zeros((d, v)),
        }

    def run(
        self,
        params: Mapping,
        tokens: Tokens,
        taps: Sequence[str] = (),
        edits: Mapping[str, Edit] | None = None,
        stop_at: str | None = None,
        positions: Tokens | None = None,
    ) -> tuple[Any, dict[str, Float[Array, "b t d"]]]:
        """One forward pass.

        tokens: int [b, t], any t. taps: sites to return. edits: site -> Edit, applied before the
        site is read by taps and by the rest of the model. stop_at: last site to compute.
        positions: int [b, t], of each token in its document, counted from 0; documents that follow
        each other in a context do not see each other. None: each context is one document.
        Returns (logits f32 [b, t, v], or None with stop_at; {site: f32 [b, t, d]}).
        Raises KeyError for a site that the model has not, ValueError for one after `stop_at`.
        Not jitted: wrap it (taps and stop_at static) in the function that uses it.
        """
        edits = edits or {}
        self._check_sites(taps, edits, stop_at)
        acts = {}
        walk = self._walk(params, tokens, positions)
        site, x = next(walk)
        while site != "logits":
            if site in edits:
                x = edits[site].fn(x, *edits[site].args)
            if site in taps:
                acts[site] = x
            if site == stop_at:
                return None, acts
            site, x = walk.send(x)
        return x, acts

    def generate(
        self,
        params: Mapping,
        tokens: Tokens,
        n: int,
        edits: Mapping[str, Edit] | None = None,
        key: jax.Array | None = None,
        temperature: float = 1.0,
    ) -> Integer[Array, "b t2"]:
        """Continues tokens int [b, t] by n tokens; returns int32 [b, t + n].

        temperature: 0 takes the likeliest token, else `key` is needed. Edits apply at every
        position. Contexts longer than `context` were not seen in training.
        Raises ValueError for a negative temperature or a missing key.
        """
        if temperature < 0 or (temperature > 0 and key is None):
            raise ValueError(
                f"temperature={temperature} with key={key}: expected temperature 0, "
                "or a positive one and a key (jax.random.key(0))"
            )
        tokens = jnp.asarray(tokens, jnp.int32)
        self._check_sites((), edits or {}, None)
        buffer = jnp.pad(tokens, ((0, 0), (0, n)))
        key = jax.random.key(0) if key is None else key
        return _fill(self, params, buffer, tokens.shape[1], dict(edits or {}), key, temperature)

    def _check_sites(self, taps, edits, stop_at) -> None:
        order = list(self.sites)
        wanted = [*taps, *edits] + ([stop_at] if stop_at else [])
        for site in wanted:
            if site not in self.sites:
                raise KeyError(f"no site {site!r} in this model: it has {', '.join(order)}")
            if stop_at and order.index(site) > order.index(stop_at):
                raise ValueError(f"site {site!r} comes after stop_at={stop_at!r}: move stop_at")

    def _walk(self, params, tokens, positions) -> Generator[tuple[str, jax.Array], jax.Array, None]:
        """Yields (site, x) in order of computation and goes on with what is sent back."""
        x = _lookup(params["embed"], tokens)
        angles = _angles(tokens.shape[1], self.d_model // self.n_heads)
        seen = _seen(tokens.shape[1], positions)
        if positions is not None:
            angles = jnp.asarray(angles)[0, jnp.asarray(positions)]
        for i in range(self.n_layers):
            block, name = params["blocks"][str(i)], f"blocks.{i}"
            x = yield f"{name}.resid_pre", x
            h = _rms_norm(x) * block["attn_norm"][None, None]
            x = x + (yield f"{name}.attn_out", self._attention(block["attn"], h, angles, seen))
            h = yield f"{name}.mlp_in", _rms_norm(x) * block["mlp_norm"][None, None]
            x = x + (yield f"{name}.mlp_out", self._mlp(block["mlp"], h))
            x = yield f"{name}.resid_post", x
        x = _rms_norm(x) * params["final_norm"][None, None]
        yield "logits", self._project(x, params["unembed"])

    def _project(self, x, weight):
        """x [b, t, i] times weight [i, o]. In two dimensions: XLA's CPU backward is 1.4x faster."""
        b, t, i = x.shape
        return self._dot("ri,io->ro", x.reshape(b * t, i), weight).reshape(b, t, weight.shape[1])

    def _dot(self, spec: str, x, y):
        x, y = x.astype(self.matmul), y.astype(self.matmul)
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    def _attention(self, params, x, angles, seen):
        b, t, d = x.shape
        heads = (b, t, self.n_heads, d // self.n_heads)
        q, k, v = (self._project(x, params[n]).reshape(heads) for n in "qkv")
        q, k = _rotate(_rms_norm(q), angles), _rotate(_rms_norm(k), angles)
        scores = self._dot("bqhe,bkhe->bhqk", q, k) / math.sqrt(heads[-1])
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
        mixed = self._dot("bhqk,bkhe->bqhe", weights, v).reshape(b, t, d)
        return self._project(mixed, params["o"])

    def _mlp(self, params, x):
        hidden = jax.nn.gelu(self._project(x, params["in"]), approximate=True)
        return self._project(hidden, params["out"])


def next_token_nats(logits: Float[Array, "b t v"], tokens: Tokens) -> Float[Array, "b t1"]:
    """-log p of each token but the first, f32 [b, t - 1] in nats.

    logits f32 [b, t, v] of the tokens int [b, t] themselves: position i predicts token i + 1.
    """
    logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _lookup(table, tokens):
    """table[tokens], [b, t, d], sharded as the tokens are."""
    table, tokens = jnp.asarray(table), jnp.asarray(tokens)
    sharding = jax.typeof(tokens).sharding
    if sharding.mesh.empty:
        return table[tokens]
    return table.at[tokens].get(out_sharding=sharding.update(spec=jax.P(*sharding.spec, None)))


def _rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)


def _angles(t: int, width: int) -> np.ndarray:
    """Rotary angles in radians, f32 [1, t, 1, width / 2]."""
    frequencies = 10000.0 ** -(np.arange(width // 2) / (width // 2))
    angles = np.arange(t)[:, None] * frequencies
    return angles.astype(np.float32)[None, :, None]


def _seen(t: int, positions):
    """Which token (axis 2) sees which (axis 3): bool, [1, 1, t, t], or [b, 1, t, t] of documents.

    A token at place i and position p sees the places i - p, where its document begins, to i.
    """
    causal = np.tril(np.ones((t, t), bool))[None, None]
    if positions is None:
        return causal
    begins = np.arange(t)[None] - jnp.asarray(positions)
    return causal & (np.arange(t)[None, None, None] >= begins[:, None, :, None])


def _rotate(x, angles):
    """Rotates the pairs (x[..., i], x[..., i + width / 2]) by their position's angles."""
    first, second = jnp.split(x, 2, axis=-1)
    library = np if isinstance(angles, np.ndarray) else jnp
    cos, sin = library.cos(angles), library.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _fill(model, params, buffer, filled, edits, key, temperature):
    """Fills buffer [b, t + n] from column `filled` on; the whole buffer is recomputed each time."""

    def step(position, buffer):
        logits, _ = model.run(params, buffer, edits=edits)
        row = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
        greedy = jnp.argmax(row, axis=-1)
        noise = jax.random.gumbel(jax.random.fold_in(key, position), row.shape)
        drawn = jnp.argmax(row / jnp.maximum(temperature, 1e-6) + noise, axis=-1)
        token = jnp.where(temperature > 0, drawn, greedy).astype(buffer.dtype)
        return jax.lax.dynamic_update_index_in_dim(buffer, token, position, axis=1)

    return jax.lax.fori_loop(filled, buffer.shape[1], step, buffer)
