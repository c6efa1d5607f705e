"""Guided SAE and SCAR: latents that are taught concepts (Härle et al. 2024, 2025).

*SCAR* (arXiv 2411.07122) is one concept; *Measuring and Guiding Monosemanticity* (arXiv 2506.19382)
has several.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, ops, sums
from saex.sae.base import ArraySpec, DenseCodes, Out, SparseCodes
from saex.sae.topk import TopK
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class Guided:
    """TopK whose first ``concepts`` latents learn to predict the labels of a row.

    Loss: that of ``TopK`` plus label_coefficient times the mean over rows of the sum over concepts
    c of BCE(sigmoid(p_c), y_c), with p_c the pre-activation: it trains also where latent c is not
    among the k. Column "label" holds [b] or [b, concepts]: 0, 1, a probability, or a negative
    number where it is not known. With label_coefficient 0 it is TopK. ``detect``: sigmoid(p_c).

    Where we differ: ReLU as SCAR (the guided SAE puts a sigmoid after TopK, so that a chosen latent
    of negative p is active); rows are scaled by a constant, not normalised one by one; squares are
    divided by the sample's variance, not by each row's own; AuxK and unit decoder rows as in
    ``TopK``. The source trains for 100 epochs with k = n / 12 and a rate of 1e-5.

    Fields:
      concepts: how many labels a row has; they take latents 0..concepts-1.
      label_coefficient: weight of the labels (the source's code: 1).
      positive_weight: weight of a label that is 1 against one that is 0 (cond_loss_scaling).
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    concepts: int = 1
    label_coefficient: float = 1.0
    positive_weight: float = 1.0
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x", "label")
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        self.plain()  # checks what it shares
        if not 1 <= self.concepts <= self.n:
            raise ValueError(f"concepts={self.concepts} of n={self.n} latents: must be in 1..n")
        for name in ("label_coefficient", "positive_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def column_widths(self) -> dict[str, int]:
        """label has one number for each concept."""
        return {"label": self.concepts}

    def plain(self) -> TopK:
        """The TopK that it is without labels."""
        return TopK(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TopK)})

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``."""
        return self.plain().specs()

    def hyper(self) -> dict[str, float]:
        """k, the weights of AuxK and of the labels."""
        return {**self.plain().hyper(), "label_coefficient": self.label_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``."""
        return self.plain().init(key, sample)

    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        return self.plain().encode(params, x)

    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return self.plain().decode(params, codes, context)

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """TopK's loss of one global batch and the cross-entropy of ``batch["label"]``."""
        loss, out = self.plain().loss(params, stats, batch, key, step, hyper)
        entropy, right = self._labels(params, affine.scaled(params, batch["x"]), batch["label"])
        metrics = {**out.metrics, "label_loss": entropy, "label_accuracy": right}
        return loss + hyper["label_coefficient"] * entropy, out.replace(metrics=metrics)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _labels(self, params: Params, x: Any, label: Any) -> tuple[Any, Any]:
        """(cross-entropy, share of the known labels that are predicted), of one global batch."""
        label = label.astype(jnp.float32).reshape(x.shape[0], -1)
        if label.shape[1] != self.concepts:
            raise ValueError(
                f"column 'label' has {label.shape[1]} numbers a row, concepts={self.concepts}: set "
                "sae.concepts to the number of labels"
            )
        n = params["W_enc"].shape[0]
        mine = min(self.concepts, n)  # concepts may lie on several devices
        p = _scores(params, x, mine, self.matmul_dtype)
        concept = ops.latents_offset(n) + jnp.arange(mine)
        y = label[:, jnp.minimum(concept, self.concepts - 1)]
        known = (y >= 0) & (concept < self.concepts)[None]
        weight = jnp.where(known, 1 + (self.positive_weight - 1) * y, 0)
        entropy = weight * (jax.nn.softplus(p) - y * p)
        right = known & ((p > 0) == (y > 0.5))
        entropy, right, known = (
            sums.mean_sum(DenseCodes(a.astype(jnp.float32))) for a in (entropy, right, known)
        )
        return entropy, right / jnp.maximum(known, 1e-9)


def detect(sae: Guided, params: Params, x: Any) -> Float[Array, "b c"]:
    """The probability of each concept in raw rows [b, d], by the taught latents alone."""
    params, x = jax.tree.map(jnp.asarray, (params, x))
    x = affine.scaled(params, x)
    return jax.nn.sigmoid(_scores(params, x, sae.concepts, sae.matmul_dtype))


def _scores(params: Params, x: Any, count: int, matmul_dtype: str) -> Any:
    """Pre-activations of the first ``count`` latents."""
    weights = (params["b_dec"], params["W_enc"][:count], params["b_enc"][:count])
    return pre_activations(x, *weights, matmul_dtype)
