"""Group bias adaptation against TopK and ReLU: features found on its statistical model.

    python experiments/reproductions/group_bias.py

Rows: 128 Gaussian directions in 42 dimensions, half of the rows sums of 3, half of 20 of them.
"""

import functools
from typing import Any

import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import (
    Found,
    Study,
    beyond,
    compile_once,
    main,
    of,
    scores,
    shuffled,
    told,
    trained,
)
from synthetic import cosines, directions, drawn, exactly, found, mixed

from saex.sae import GroupBias, ReLU, TopK

STUDY = Study(
    name="group_bias",
    methods=("group_bias", "topk", "relu"),
    claim="On rows of mixed sparsity group bias adaptation finds the features without a k to tune, "
    "as many as TopK with its best k and more than TopK with a wrong one or ReLU.",
    source="arXiv 2506.14002",
    paper="features found at cosine 0.8 / 0.9: adaptation 100% / 100%, with wrong targets 38.3% / "
    "3.9%; TopK k 20 100% / 98.4%, k 30 98.4% / 24.2%, k 50 94.5% / 23.4%",
    own_text=False,
    baseline="TopK with k 10, 20 and 30 and ReLU with two penalties, 256 latents; for a k, "
    f"penalty or ladder of targets apart each {TUNED.format('FVU')}; the adaptation's "
    "targets go from 0.1 down, those from 0.5 stand beside",
    says_no_if="adaptation finds fewer than 95% at cosine 0.9 in a seed, or a seed is not above "
    "all of TopK with k 30 and of ReLU with any penalty, or its mean is below TopK's best k's",
)
G, D_IN, N, BATCH, STEPS = 128, 42, 256, 256, 4000
MAKE = mixed(G, 3, 20)
COMMON = {"d_in": D_IN, "n": N, "dead_after_tokens": 100_000}
# The source: every 50 steps at 0.01, over far longer runs. With less than this the features of the
# control's rows were not found in these steps either.
QUICK = {"every": 10, "rate_down": 0.05, "rate_up": 0.05}
# Summaries of the source name two ladders of targets, from 0.1 and from 0.5 down; a feature here
# is in 9% of rows.
SAES = {
    "group_bias": GroupBias(most=0.1, **COMMON, **QUICK),
    "group_bias 0.5": GroupBias(most=0.5, **COMMON, **QUICK),
    **{f"topk {k}": TopK(k=k, **COMMON) for k in (10, 20, 30)},
    **{f"relu {p}": ReLU(l1=p, l1_warmup_steps=200, **COMMON) for p in (0.1, 0.3)},
}


@functools.lru_cache(maxsize=2)
def data(seed: int) -> tuple[np.ndarray, tuple, tuple]:
    """Rows for training, and (features, rows) for finding a rate and for scores."""
    D = directions(G, D_IN, seed)
    kinds = (200_000, seed), (10_000, 10**7 + seed), (10_000, 10**6 + seed)
    train, *others = (drawn(MAKE, D, rows, s)[0] for rows, s in kinds)
    return train, *((D, x) for x in others)


def scored(sae: Any, params: Any, part: tuple) -> dict:
    """Scores with the shares of features found."""
    D, x = part
    C = cosines(params, D)
    return {f"at_{least}": found(C, least) for least in (0.8, 0.9)} | scores(sae, params, x)


def run(small: bool) -> Found:
    compile_once()
    how = {"steps": 20 if small else STEPS, "small": small, "batch": BATCH, "how": SHORT_RUN}
    runs, grids = compared(SAES, data, score=scored, **how)
    got = {name: of(runs, "at_0.9", method=name) for name in SAES}
    ours, mean = got["group_bias"], {name: np.mean(v) for name, v in got.items()}
    best = max((name for name in SAES if name.startswith("topk")), key=mean.__getitem__)
    above = [name for name in SAES if name == "topk 30" or name.startswith("relu")]
    holds = (
        min(ours) >= 0.95
        and all(beyond(got[name], ours) for name in above)
        and mean["group_bias"] >= mean[best]
    )
    line = "; ".join(
        f"{name} {np.mean(of(runs, 'at_0.8', method=name)):.0%} / "
        f"{told(of(runs, 'at_0.9', method=name), '.0%')}, "
        f"L0 {np.mean(of(runs, 'l0', method=name)):.0f}"
        for name in SAES
    )
    why = f"at 0.9 TopK's best is {best} with {mean[best]:.0%}; adaptation {mean['group_bias']:.0%}"
    return Found(bool(holds), "found at 0.8 / 0.9: " + line, why, runs, control, grids)


def control() -> tuple[bool, str]:
    """Rows of 3 of 64 directions in 32 dimensions: whether 95% of them are found, in words too."""
    D, shares = directions(64, 32), []
    x = drawn(exactly(64, 3), D, 200_000, 0)[0]
    sae = GroupBias(32, N, most=0.1, dead_after_tokens=100_000, **QUICK)
    for seed in range(3):
        batches = shuffled({"x": x}, BATCH, seed)
        params, _ = trained(sae, batches, steps=STEPS, lr=1e-2, seed=seed, **SHORT_RUN)
        shares.append([found(cosines(params, D), least) for least in (0.8, 0.9)])
    at = " / ".join(told(share, ".0%") for share in zip(*shares))
    text = f"sums of 3 of 64 directions in 32 dimensions: adaptation finds {at} at 0.8 / 0.9"
    return min(share for _, share in shares) >= 0.95, text


if __name__ == "__main__":
    main(STUDY, run)
