"""AbsTopK against TopK with as many and with twice as many latents.

    python experiments/reproductions/abs_topk.py

Rows: 3 of 64 axes in 32 dimensions, either sign; and rows of pocket-lm.
"""

import functools

import numpy as np
from study import (
    Found,
    Study,
    at_best_rate,
    beyond,
    codes_of,
    compile_once,
    main,
    of,
    pocket_rows,
    scores,
    shuffled,
    told,
    trained,
)
from synthetic import cosines, directions, drawn, exactly

from saex.sae import AbsTopK, TopK

STUDY = Study(
    name="abs_topk",
    methods=("abs_topk", "topk"),
    claim="At equal k AbsTopK reconstructs better than TopK of the same width, on rows of features "
    "with two poles also better than TopK of twice the width.",
    source="arXiv 2510.00404",
    paper="lower normalised MSE at most k on language models' layers, curves without a table; "
    "29.7% of latents with a meaning in both directions (TopK 5.3%), Gemma-2-2B layer 12",
    own_text=False,
    baseline="TopK of n and of 2n latents, AuxK on; each method with the better of two learning "
    "rates by mean FVU of the seeds (pocket-lm: on rows apart from those of the scores)",
    says_no_if="a seed of AbsTopK is not below all seeds of TopK with n (both data) or with 2n "
    "(two poles) in FVU",
)
MAKE = exactly(64, 3, signed=True)


def sides(d: int, n: int, k: int) -> dict:
    """The method, its baseline, and the baseline of twice the width."""
    common = {"d_in": d, "k": k, "dead_after_tokens": 50_000}
    return {
        "abs_topk": AbsTopK(n=n, **common),
        "topk": TopK(n=n, **common),
        "topk 2n": TopK(n=2 * n, **common),
    }


@functools.cache
def data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features, rows for training, rows for scores)."""
    D = directions(64, 32, seed)
    return D, drawn(MAKE, D, 200_000, seed)[0], drawn(MAKE, D, 20_000, 10**6 + seed)[0]


def poles(C: np.ndarray, signed: bool) -> dict[str, float]:
    """Shares of axes of which a pole, and of which both, are found at cosine 0.95."""
    up, down = C.max(0) >= 0.95, C.min(0) <= -0.95
    return {
        "axes": float((up | down).mean()),
        "both": float((up | down if signed else up & down).mean()),
    }


def two_poles(small: bool) -> list[dict]:
    """Runs on bidirectional features."""
    runs, steps = [], 60 if small else 1500
    for name, sae in sides(32, 64, 3).items():
        for lr in (3e-3, 1e-2):
            for seed in range(1 if small else 3):
                D, train, test = data(seed)
                batches = shuffled({"x": train}, 256, seed)
                params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed)
                got = scores(sae, params, test)
                got |= poles(cosines(params, D), name == "abs_topk")
                runs.append({"data": "poles", "method": name, "lr": lr, "seed": seed, **got})
    return at_best_rate(runs, "fvu")


def language(small: bool) -> list[dict]:
    """Runs on pocket-lm's rows."""
    runs, steps = [], 10 if small else 300
    train, choose, test = pocket_rows(small)
    for name, sae in sides(256, 512, 16).items():
        for lr in (2e-3, 5e-3):
            for seed in range(1 if small else 3):
                batches = shuffled({"x": train}, 512, seed)
                params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed)
                got = {"choice": scores(sae, params, choose)["fvu"], **scores(sae, params, test)}
                f = codes_of(sae, params, test[:8192])
                got["two_signs"] = float(((f > 0).any(0) & (f < 0).any(0)).mean())
                runs.append({"data": "pocket-lm", "method": name, "lr": lr, "seed": seed, **got})
    return at_best_rate(runs, "choice")


def run(small: bool) -> Found:
    compile_once()
    return judged(two_poles(small) + language(small))


def judged(runs: list[dict]) -> Found:
    """The verdict on every run's scores."""

    def fvu(data: str, name: str) -> list[float]:
        return of(runs, "fvu", data=data, method=name, best=True)

    below = {
        f"{data}, {name}": beyond(fvu(data, "abs_topk"), fvu(data, name))
        for data in ("poles", "pocket-lm")
        for name in ("topk", "topk 2n")
    }
    names = ("abs_topk", "topk", "topk 2n")
    ours = "; ".join(
        f"{data}: " + ", ".join(f"{name} {told(fvu(data, name))}" for name in names)
        for data in ("poles", "pocket-lm")
    )
    both = ", ".join(
        f"{name} {told(of(runs, 'both', method=name, best=True, data='poles'), '.2f')}"
        for name in names
    )
    signs = told(of(runs, "two_signs", method="abs_topk", best=True, data="pocket-lm"), ".2f")
    yes, no = ([at for at, is_below in below.items() if is_below == side] for side in (True, False))
    why = (
        f"below all seeds of: {'; '.join(yes) or 'none'}; not of: {'; '.join(no) or 'none'}. Axes "
        f"whose two poles are found at cosine 0.95: {both}; of AbsTopK's latents on pocket-lm "
        f"{signs} fire with both signs"
    )
    holds = all(is_below for at, is_below in below.items() if at != "pocket-lm, topk 2n")
    control = f"two poles, TopK of the same width: {'wins' if below['poles, topk'] else 'fails'}"
    return Found(holds, "FVU, " + ours, why, runs, "" if holds else control)


if __name__ == "__main__":
    main(STUDY, run)
