"""MSAE: nested TopK levels (Zaigrajew, Baniecki, Biecek 2025, arXiv 2502.20578)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, nested, ops, ragged
from saex.sae.base import ArraySpec, DenseCodes, Out, SparseCodes
from saex.sae.topk import TopK
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class MSAE:
    """One encoder pass, several k: f_l = relu(top_{k_l}(p)), each level must reconstruct x.

    p = (x - b_dec) W_enc^T + b_enc; x_hat_l = f_l W_dec + b_dec; k_l = k times ``levels``; the last
    level (``whole``) is relu(p), a dense SAE. Supports are nested, and latents have no order.
    Loss: sum_l r_l s MSE(x_hat_l) / sum_l r_l with r = 1, or L, L - 1, .. 1, so that the sparsest
    level weighs most (the authors' list; their comment says the opposite). No L1, no AuxK.
    Inference is TopK with k; ``dataclasses.replace(sae, k=...)`` reads the same params by another.

    The levels share p and one selection; each latent of them is decoded once. ``whole`` costs a
    dense decode and a dense backward pass: more than all else.

    Where we differ: s * MSE where the source divides each row's squares by its own (it reports
    that plain MSE proved better since); unit decoder rows and the start as in ``TopK``; levels
    of 64 doubling up to n in the source; no soft cap, which is off there too.

    Fields:
      k: active latents a row at inference. levels: multiples of k that are trained, ascending.
      whole: whether all of relu(p) is a level too. weights: r: "uniform" or "reverse".
      dead_after_tokens: rows without firing in the largest of ``levels``: a metric.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    levels: tuple[int, ...] = (1, 2, 4, 8)
    whole: bool = True
    weights: Literal["uniform", "reverse"] = "uniform"
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        steps = [b - a for a, b in zip((0, *self.levels), self.levels)]
        if not steps or min(steps) < 1:
            raise ValueError(f"levels={self.levels}: whole numbers above 0, in ascending order")
        if not 1 <= self.k <= self.largest <= self.n:
            raise ValueError(
                f"k={self.k} with levels={self.levels} takes {self.largest} of n={self.n} latents: "
                "between 1 and n are possible"
            )

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def largest(self) -> int:
        """The k of the last of ``levels``."""
        return self.k * self.levels[-1]

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``."""
        return self._plain().specs()

    def hyper(self) -> dict[str, float]:
        """k."""
        return {"k": float(self.k)}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK`` with k."""
        return self._plain().init(key, sample)

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        return self._choose(params, affine.scaled(params, x), self.k, self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """The weighted mean over levels of s * MSE of one global batch ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        held = jax.lax.stop_gradient(params)
        codes = self._choose(held, x, self.largest, hyper["k"] * self.levels[-1])
        level = self._level(codes.values, hyper["k"])
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        lines = ragged.of_levels(codes, level, len(self.levels))
        parts = nested.decode_ragged(params, x, lines)

        b_dec = params["b_dec"][None]
        residuals = [x - part - b_dec for part in parts]
        named = dict(zip([f"fvu_{m}k" for m in self.levels], residuals))
        if self.whole:
            f = DenseCodes(jax.nn.relu(affine.scores(params, x, self.matmul_dtype)))
            named["fvu_whole"] = x - affine.decode(params, f, self.matmul_dtype)
        r = [1.0 if self.weights == "uniform" else len(named) - i for i in range(len(named))]
        mse = [stats["mse_scale"] * losses.mse(e) for e in named.values()]
        loss = sum(weight * each for weight, each in zip(r, mse)) / sum(r)
        active = SparseCodes(jnp.where(level == 0, codes.values, 0), codes.indices)
        metrics = {"mse": mse[0], **{name: losses.fvu(x, e) for name, e in named.items()}}
        metrics |= losses.figures(x, residuals[0], active, dead)
        return loss, Out(metrics, stats, x - residuals[0])

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _plain(self) -> TopK:
        shared = {f.name for f in dataclasses.fields(TopK)} & {
            f.name for f in dataclasses.fields(self)
        }
        return TopK(**{name: getattr(self, name) for name in shared})

    def _choose(self, params: Params, x: Any, k: int, active_k: Any) -> SparseCodes:
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        values, indices = ops.select_topk(x, *weights, k, active_k, self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)

    def _level(self, values: Any, k: Any) -> Any:
        """The first level that each slot (largest first) belongs to, from 0."""
        inner = (ops.keep_largest(values, self.largest, k * m) == 0 for m in self.levels[:-1])
        return sum((out.astype(jnp.int32) for out in inner), jnp.zeros(values.shape, jnp.int32))
