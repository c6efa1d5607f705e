"""AdaptiveK SAE: a probe of a row's complexity says how many latents it gets (arXiv 2508.17320)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops, probe
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params

PULL = 0.2  # the pull to the ridge solution at the start, and so many steps back it looks
BACK = 3


@dataclasses.dataclass(frozen=True)
class AdaptiveK:
    """``TopK`` with a k for each row, which a linear probe reads off the row.

    k = round(k_min + (k_max - k_min) sigmoid(steep (s / 10 - 1/2))), s = clip(x w + b, 0, 10).

    The probe (w, b) is fitted to the column "complexity" of the sample by ridge regression at
    initialisation (the penalty by five-fold validation) and held until ``tune_from`` of the run.
    From then on its own loss tunes it, near that solution: ``probe.tuning_loss``, whose pull to the
    solution weakens while the error falls (Yao and Du 2025). No gradient of the reconstruction
    reaches it, and inference needs no labels.

    Loss: s * MSE + l1 ||f||_1 / ||x|| (means over rows) + aux_coefficient * AuxK, with s and AuxK
    as in ``TopK``; the authors neither divide the MSE by the variance nor detach AuxK's residual.
    They count the penalty half and per batch, with a learning rate and clipping of the probe's own;
    here it is the ridge regression's, so that tuning starts where that ended, and all share one
    optimiser. So Adam's count of steps is shared too: when the probe's first gradient comes, the
    corrections of both moments are over, and its first steps are some three times the rate. The
    probe sees rows scaled by ``probe_scale``, so that one learning rate suits both.

    A step costs what ``TopK`` of k_max costs. Compare at equal mean L0, against shuffled k too.

    Fields:
      k_min, k_max, steep: the map from complexity to k.
      lowest, highest: values of the column that stand for 0 and 10; beyond them it is clipped.
      tune_from: share of the run after which the probe is tuned. probe_weight: of its loss.
      l1: weight of the L1 term, which shrinks codes; 0 leaves it out.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k_min: int = 20
    k_max: int = 320
    steep: float = 6.0
    lowest: float = 0.0
    highest: float = 10.0
    tune_from: float = 0.9
    probe_weight: float = 0.9
    l1: float = 0.005
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x", "complexity")
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_dead_after(self.dead_after_tokens)
        if not 1 <= self.k_min <= self.k_max <= self.n:
            raise ValueError(
                f"k_min={self.k_min}, k_max={self.k_max}, n={self.n}: 1 <= k_min <= k_max <= n"
            )
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest} must be below highest={self.highest}")
        if not 0 <= self.tune_from <= 1:
            raise ValueError(f"tune_from={self.tune_from}: a share of the run, 0 to 1")
        for name in ("l1", "probe_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def k(self) -> int:
        """k_max: slots a row."""
        return self.k_max

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``, and the probe with its scale; stats: also what tuning holds on to."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["probe_w"] = ArraySpec((self.d_in,), ("d",), doc="complexity = x probe_scale w + b")
        params["probe_b"] = ArraySpec((), (), doc="the probe's intercept")
        params["probe_scale"] = ArraySpec((), (), trainable=False, doc="the probe's input scale")
        stats = {
            **affine.stats_specs(self.n),
            "probe_w": ArraySpec((self.d_in,), (None,), doc="the ridge solution"),
            "probe_b": ArraySpec((), (), doc="its intercept"),
            "penalty": ArraySpec((), (), doc="its penalty per row"),
            "pull": ArraySpec((), (), doc="weight of the distance to it"),
            "errors": ArraySpec((BACK,), (None,), doc="the probe's last errors, oldest first"),
        }
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """The weights of the loss's terms."""
        weights = {"l1": self.l1, "probe_weight": self.probe_weight}
        return {"aux_coefficient": self.aux_coefficient, **weights}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK`` of the k of complexity 5; the probe fitted to the sample."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        w, b, penalty = probe.fit(x, self._target(sample))
        params |= {"probe_w": w, "probe_b": b, "probe_scale": params["scale"] + 0}
        stats = {
            **affine.stats(self.n, x),
            "probe_w": w + 0,
            "probe_b": b + 0,
            "penalty": penalty / x.shape[0],
            "pull": jnp.full((), PULL),
            "errors": jnp.zeros((BACK,)),
        }
        return affine.match_norms(probe_key, params, (self.k_min + self.k_max) // 2), stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k_max] of raw rows [b, d]."""
        return self._encode(params, x)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """The dictionary's loss and, late in the run, the probe's, of one global batch."""
        x = affine.scaled(params, batch["x"])
        chosen = self._encode(jax.lax.stop_gradient(params), batch["x"])
        after, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux, served = affine.decode_aux(
            params, x, chosen, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        mse = stats["mse_scale"] * losses.mse(x - y)
        sums = ops.latents_sum(jnp.sum(codes.values, axis=1))
        l1 = ops.rows_mean(sums) / ops.rows_mean(jnp.linalg.norm(x, axis=1))
        tuning, wrong, after = self._tune(params, after, batch, step, hyper["steps"])
        metrics = {"mse": mse, "l1": l1, "aux_k": aux, "aux_served": served, "probe": wrong}
        metrics |= losses.figures(x, x - y, codes, dead)
        total = mse + hyper["l1"] * l1 + hyper["aux_coefficient"] * aux
        return total + hyper["probe_weight"] * tuning, Out(metrics, after, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def latents_of(self, complexity: Any) -> jax.Array:
        """k, int32, of predicted complexities (0 to 10; beyond, clipped)."""
        s = jnp.clip(complexity, 0, 10)
        k = self.k_min + (self.k_max - self.k_min) * jax.nn.sigmoid(self.steep * (s / 10 - 0.5))
        return jnp.round(jnp.clip(k, self.k_min, self.k_max)).astype(jnp.int32)

    def _encode(self, params: Params, x: Any) -> SparseCodes:
        rows = x.astype(jnp.float32) * params["probe_scale"]
        k = self.latents_of(rows @ params["probe_w"] + params["probe_b"])
        weights = affine.scaled(params, x), params["b_dec"], params["W_enc"], params["b_enc"]
        values, indices = ops.select_topk(*weights, self.k_max, k[:, None], self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)

    def _target(self, batch: Batch) -> Any:
        """The column in the probe's units, 0 to 10."""
        share = (batch["complexity"].astype(jnp.float32) - self.lowest) / (
            self.highest - self.lowest
        )
        return 10 * jnp.clip(share, 0, 1).reshape(-1)

    def _tune(self, params: Params, stats: Params, batch: Batch, step: Any, steps: Any) -> Any:
        """(the probe's loss where it is its time, else 0; its error; stats)."""
        rows = batch["x"].astype(jnp.float32) * params["probe_scale"]
        weights = params["probe_w"], params["probe_b"]
        loss, error = probe.tuning_loss(*weights, stats, rows, self._target(batch))
        since = step - jnp.floor(self.tune_from * steps)
        before, error = stats["errors"], jax.lax.stop_gradient(error)
        pull = probe.next_pull(stats["pull"], error, before[0])
        pull = jnp.where(since >= BACK, pull, stats["pull"])
        stats = {**stats, "pull": pull, "errors": jnp.append(before[1:], error)}
        return jnp.where(since >= 0, loss, 0), error, stats
