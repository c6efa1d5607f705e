"""Methods at one L0, whether they have a k or a penalty: what several studies here share."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from rates import SHORT_RUN, best_rate
from study import at_l0, beyond, compile_once, of, told, tried
from synthetic import orthonormal, sums

from saex.sae import SAES
from saex.sae.transform import estimate_threshold

BATCH, SEEDS, LR = 512, (1, 2, 3), 5e-3  # the rate where none is looked for
compile_once()  # a step's program is the same for all seeds and penalties, and takes as 150 steps
# What a run of some 200,000 rows asks of each method; the defaults are for billions.
SHORT: dict[str, dict[str, Any]] = {
    "topk": {"dead_after_tokens": 50_000},
    "batch_topk": {"dead_after_tokens": 50_000},
    "relu": {"l1_warmup_steps": 40},
    "gated": {"l1_warmup_steps": 40},
    "jump_relu": {"l0_warmup_steps": 40, "bandwidth": 0.03, "threshold": 0.03},
    "jump_relu_tanh": {"initial_l0": 128},
}
# "l0" in a run is what came out
PENALTIES = {"relu": "l1", "gated": "l1", "jump_relu": "l0", "jump_relu_tanh": "sparsity"}


def fitted(
    name: str, setting: Mapping[str, Any], train: np.ndarray, test: np.ndarray, n: int, **how: Any
) -> dict[str, Any]:
    """One run of a method; ``how``: steps, lr, seed. BatchTopK's threshold is set to give its k."""
    sae = SAES[name](train.shape[1], n, **{**SHORT[name], **setting})

    def finish(params):
        if name != "batch_topk":
            return params
        return {**params, "threshold": estimate_threshold(sae, params, jnp.asarray(train[:8192]))}

    on = noted(name, setting)
    return tried(name, sae, train, test, batch=BATCH, **SHORT_RUN, finish=finish, **on, **how)


def noted(name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as runs have it."""
    return {"penalty" if k == PENALTIES.get(name) else k: v for k, v in setting.items()}


def best_rate_at(
    name: str,
    settings: Sequence[Mapping[str, Any]],
    l0: float,
    *args: Any,
    **how: Any,
) -> dict[str, Any]:
    """How the rate with the least FVU at an L0 is found: of a k, or between two penalties."""

    def fvu(lr: float) -> float:
        return read_at([fitted(name, s, *args, lr=lr, seed=0, **how) for s in settings], "fvu", l0)

    return best_rate(name, fvu)


def read_at(runs: Sequence[Mapping[str, Any]], score: str, l0: float) -> float:
    """A score (above 0) of one seed's runs at an L0: of the only one, or between them."""
    if len(runs) == 1:
        return runs[0][score]
    return at_l0([(run["l0"], run[score]) for run in runs], l0)


def control(settings: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
    """How methods do where the same k for all rows must lose: rows of 1 to 15 of 64 features.

    The features are orthonormal. Each method has the L0 that its setting gives, TopK that k,
    rounded up.

    Returns:
      Whether all win, and what came out.
    """
    x = sums(orthonormal(64), 44_000, np.random.default_rng(1).integers(1, 16, 44_000), 0)[0]

    def fvu_and_l0(name, setting):
        how = {"steps": 500, "lr": LR}
        runs = [fitted(name, setting, x[:40_000], x[40_000:], 64, seed=s, **how) for s in SEEDS]
        return of(runs, "fvu"), statistics.mean(of(runs, "l0"))

    parts, passed = [], True
    for name, setting in settings.items():
        found, l0 = fvu_and_l0(name, setting)
        other, _ = fvu_and_l0("topk", {"k": math.ceil(l0 - 0.05)})
        passed = passed and beyond(found, other)
        verdict = "below" if beyond(found, other) else "not below"
        parts.append(f"{name} {told(found)} at L0 {l0:.1f}, {verdict} TopK's {told(other)}")
    return passed, "FVU on rows of 1 to 15 orthonormal features: " + "; ".join(parts)
