"""Matryoshka SAE over BatchTopK (Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547)."""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, nested, ops, selection
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.sae.batch_topk import BatchTopK
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class Matryoshka:
    """BatchTopK whose first m_1 < m_2 < ... < m_G = n latents must each reconstruct x alone.

    f as in ``BatchTopK``, chosen once over all latents; x_hat_g = b_dec + sum of f_i W_dec,i over
    i < m_g.
    Loss: mean over g of s * MSE(x_hat_g) + aux_coefficient * AuxK (of x_hat_G, as in ``TopK``), so
    that one group is BatchTopK. The source writes the sum over g; its code a mean over G + 1 with
    the empty prefix. No gradient is cut between groups, as the source. Inference by a threshold,
    also of a prefix alone: ``first_latents``.

    Prefixes are fixed (``fractions``), or drawn in each step (``sampled``): ``sampled`` - 1 lengths
    without replacement with P(j) proportional to sqrt(j) - sqrt(j - 1), and n (the authors' second
    code; theirs is a ReLU with L1).

    A latent is decoded once, whatever the number of prefixes; densely (as in ``BatchTopK``) it
    takes one decode, or G where prefixes are drawn or latents are split. G reconstructions a row
    are held, and summed between devices that share the latents.

    Fields:
      fractions: shares of the latents of each group, in order; the last takes the remainder.
      sampled: 0, or how many prefixes are drawn anew in each step, instead of ``fractions``.
      others: as in ``BatchTopK``.
    """

    d_in: int
    n: int
    k: int = 32
    fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    sampled: int = 0
    capacity: int | None = None
    threshold_rate: float = 0.01
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ("threshold",)
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        self.whole()  # checks what it shares
        if not 0 <= self.sampled <= self.n:
            raise ValueError(f"sampled={self.sampled} prefixes of n={self.n} latents: in 0..n")
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions={self.fractions}: shares above 0 that sum up to 1")
        sizes = [b - a for a, b in itertools.pairwise((0, *self.prefixes))]
        if min(sizes) < 1 and not self.sampled:
            raise ValueError(f"fractions={self.fractions} of n={self.n} give groups of {sizes}")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def prefixes(self) -> tuple[int, ...]:
        """m_1 .. m_G of the fixed groups."""
        ends = [int(total * self.n + 1e-6) for total in itertools.accumulate(self.fractions)]
        return (*ends[:-1], self.n)

    @property
    def groups(self) -> int:
        """G, the number of prefixes."""
        return self.sampled or len(self.fractions)

    def whole(self, n: int | None = None) -> BatchTopK:
        """The BatchTopK of the first n (None: all) latents."""
        names = {f.name for f in dataclasses.fields(BatchTopK)} - {"n", "capacity"}
        shared = {name: getattr(self, name) for name in names}
        if n is None:
            return BatchTopK(**shared, n=self.n, capacity=self.capacity)
        return BatchTopK(**{**shared, "k": min(self.k, n)}, n=n)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``BatchTopK``."""
        return self.whole().specs()

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``BatchTopK``."""
        return self.whole().init(key, sample)

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d], by the threshold."""
        p = affine.scores(params, affine.scaled(params, x), self.matmul_dtype)
        return DenseCodes(jnp.where(p > params["threshold"], jax.nn.relu(p), 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Mean over the prefixes of s * MSE, and AuxK, of one global batch ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        n = stats["since_fired"].shape[0]
        ends = self._ends(key)
        fixed = self.prefixes if n == self.n and not self.sampled else None

        def level(indices):
            return _level(indices, n, ends)

        def objective(params, codes, cut):
            levels = nested.Levels(self.groups, level, fixed)
            parts = nested.decode(params, x, codes, levels, self.matmul_dtype)
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            each = [x - part - params["b_dec"][None] for part in parts]
            aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
            aux_k, served = affine.aux_alone(params, x, each[-1], dead, *aux)
            mse = stats["mse_scale"] * sum(losses.mse(r) for r in each) / self.groups
            metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served, "cut": cut}
            metrics |= {f"fvu_{g + 1}": losses.fvu(x, r) for g, r in enumerate(each[:-1])}
            metrics |= losses.figures(x, each[-1], codes, dead)
            lowest = selection.smallest(codes)
            return mse + hyper["aux_coefficient"] * aux_k, (metrics, after, x - each[-1], lowest)

        how = hyper["k"], self.k, self.capacity, objective, self.matmul_dtype
        levels = {"level": level, "levels": self.groups}
        out = selection.of_batch(params, stats, x, *how, **levels)
        loss, metrics, after, y, lowest = out
        threshold = selection.follow(params["threshold"], lowest, self.threshold_rate)
        metrics |= {"threshold": threshold}
        return loss, Out(metrics, after, y, {"threshold": threshold})

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _ends(self, key: Any) -> Any:
        """m_1 .. m_G of this step, int32 [G]."""
        if not self.sampled:
            return jnp.asarray(self.prefixes, jnp.int32)
        j = jnp.arange(1, self.n, dtype=jnp.float32)
        chances = jnp.log(jnp.sqrt(j) - jnp.sqrt(j - 1)) + jax.random.gumbel(key, (self.n - 1,))
        # of the largest log chances with Gumbel noise: a sample without replacement
        _, drawn = jax.lax.top_k(chances, self.sampled - 1)
        return jnp.append(jnp.sort(drawn + 1), self.n).astype(jnp.int32)


def first_latents(sae: Matryoshka, params: Params, m: int) -> tuple[BatchTopK, Params]:
    """The dictionary of the first m latents alone, with the same threshold.

    Raises:
      ValueError: m outside of 1..n.
    """
    if not 1 <= m <= sae.n:
        raise ValueError(f"the first m={m} of n={sae.n} latents: m must be in 1..n")
    cut = {name: params[name][:m] for name in ("W_enc", "W_dec", "b_enc")}
    return sae.whole(m), {**params, **cut}


def _level(indices: Any, n_local: int, ends: Any) -> Any:
    """Of this device's latents by number: the first prefix that each belongs to, from 0."""
    at = indices + ops.latents_offset(n_local)
    return jnp.sum(at[..., None] >= ends[:-1].reshape((1,) * at.ndim + (-1,)), axis=-1)
