"""The optimiser: an optax chain, a schedule, and the field's rule for the learning rate."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import optax

from saex.train.moments import scale_by_adam_bfloat16


@dataclasses.dataclass(frozen=True)
class Optim:
    """Adam with linear warm-up and linear decay to 0.

    Fields:
      lr: peak learning rate; None: 2e-4 / sqrt(n / 2^14) for n latents, after Gao et al. 2024.
      b1, b2, eps: Adam's.
      warmup: share of the run over which the rate rises from 0.
      decay: share of the run, at its end, over which it falls to 0.
      clip: largest global norm of the (projected) gradient; None: no clipping. A norm below every
        gradient's (0.01) helps runs of some hundred steps, penalties most: without it the second
        moment remembers the first gradients, which are the largest, to the end.
      moments: how Adam's moments are kept; bfloat16 (rounded at random) takes half the memory.
    """

    lr: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    warmup: float = 0.02
    decay: float = 0.2
    clip: float | None = None
    moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr={self.lr}: a positive rate, or None for the rule")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(
                f"warmup={self.warmup}, decay={self.decay}: shares of the run, together at most 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: a positive norm, or None")

    def learning_rate(self, n: int) -> float:
        """The peak rate for n latents."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(n / 2**14)

    def transformation(self) -> optax.GradientTransformation:
        """Clip and Adam's direction; the step multiplies by -rate, which reaches it traced."""
        clip = [optax.clip_by_global_norm(self.clip)] if self.clip is not None else []
        adam = {"float32": optax.scale_by_adam, "bfloat16": scale_by_adam_bfloat16}[self.moments]
        return optax.chain(*clip, adam(self.b1, self.b2, self.eps))

    def factor(self, step: Any, steps: int) -> Any:
        """The schedule in 0..1 at ``step`` (traced) of ``steps``."""
        warm = max(round(self.warmup * steps), 1)
        last = max(round(self.decay * steps), 1)
        up = jnp.minimum(1.0, (step + 1) / warm)
        down = jnp.minimum(1.0, (steps - step) / last) if self.decay else 1.0
        return up * down
