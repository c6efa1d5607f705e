"""GroupMax SAE: of each group of latents the largest (the "groupmax" of EleutherAI's sparsify)."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class GroupMax:
    """p = (x - b_dec) W_enc^T + b_enc; of each group of n / k latents f keeps relu of the largest.

    Groups are runs of the latents' order, as in sparsify: latents 0 .. n/k - 1 are the first. So
    every row has k active latents (fewer where a group has none above 0), one of a group, and
    selection is k small maxima in place of a top-k. x_hat = f W_dec + b_dec.

    Loss, AuxK, initialisation and unit decoder rows as in ``TopK``. (sparsify's own loss divides by
    the batch's variance.) The scores are made as [b, n], without a gradient; the rest is sparse.

    Fields:
      k: groups, and the bound on active latents a row; it must divide n.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        if self.n % self.k:
            raise ValueError(f"k={self.k} groups of n={self.n} latents: k must divide n")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``."""
        stats = affine.stats_specs(self.n)
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The weight of AuxK; k is the shape of the groups."""
        return {"aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        stats = affine.stats(self.n, x)
        return affine.match_norms(probe_key, params, self.k), stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        chosen = self._encode(jax.lax.stop_gradient(params), x)
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux, served = affine.decode_aux(
            params, x, chosen, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "aux_k": aux, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        return mse + hyper["aux_coefficient"] * aux, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encode(self, params: Params, x: Any) -> SparseCodes:
        weights = params["b_dec"], params["W_enc"], params["b_enc"]
        p = pre_activations(x, *weights, self.matmul_dtype)
        values, indices = _largest_of_groups(p, ops.latents_count(params["W_enc"]) // self.k)
        room = ((0, 0), (0, self.k - values.shape[1]))
        values = jnp.pad(jax.nn.relu(values), room)
        return affine.used_slots(values, jnp.pad(indices, room))


def _largest_of_groups(p: Any, size: int) -> tuple[Any, Any]:
    """(values, indices) [b, pieces] of the largest in each of this device's pieces of a group.

    A group may lie on several devices: each takes the largest of its pieces (of one length, which
    divides groups and devices), and keeps it where no other piece of the group has a larger one, or
    an equal one of a lower latent. Values that lost are 0.
    """
    b, n_local = p.shape
    piece = math.gcd(n_local, size)
    split = p.reshape(b, n_local // piece, piece)
    values = jnp.max(split, axis=2)
    first = jnp.arange(n_local // piece, dtype=jnp.int32) * piece
    indices = jnp.argmax(split, axis=2).astype(jnp.int32) + first[None]
    if piece == size:
        return values, indices
    rivals = ops.latents_gather(values).reshape(b, -1, size // piece)
    won = jnp.arange(size // piece)[None, None] == jnp.argmax(rivals, axis=2)[..., None]
    start = ops.latents_offset(n_local) // piece
    won = jax.lax.dynamic_slice_in_dim(won.reshape(b, -1), start, values.shape[1], axis=1)
    return jnp.where(won, values, 0), indices
