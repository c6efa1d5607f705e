"""AbsTopK against TopK with as many and with twice as many latents.

    python experiments/reproductions/abs_topk.py

Rows: 3 of 64 axes in 32 dimensions, either sign; and rows of pocket-lm.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import Found, Study, beyond, codes_of, compile_once, main, of, pocket_rows, scores, told
from synthetic import cosines, directions, drawn, exactly, orthonormal

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
    baseline="TopK of n and of 2n latents, n 96 for 64 axes and 512 on pocket-lm; none has AuxK, "
    f"of which the source says nothing; each {TUNED.format('FVU')}",
    says_no_if="a seed of AbsTopK is not below all seeds of TopK with n (both data) or with 2n "
    "(two poles) in FVU",
)
MAKE = exactly(64, 3, signed=True)


def sides(d: int, n: int, k: int) -> dict[str, Any]:
    """The method, its baseline, and the baseline of twice the width."""
    return {
        "abs_topk": AbsTopK(d, n, k=k),
        "topk": TopK(d, n, k=k, aux_coefficient=0.0),
        "topk 2n": TopK(d, 2 * n, k=k, aux_coefficient=0.0),
    }


@functools.cache
def axes_of(seed: int) -> np.ndarray:
    return directions(64, 32, seed)


@functools.cache
def poles(seed: int) -> tuple[np.ndarray, ...]:
    """Rows for training, for finding a rate, and for scores."""
    rows = ((200_000, seed), (10_000, 10**7 + seed), (20_000, 10**6 + seed))
    return tuple(drawn(MAKE, axes_of(seed), count, at)[0] for count, at in rows)


def both_signs(sae: Any, params: Any, x: np.ndarray) -> dict[str, float]:
    """Scores, and the share of latents that fire with both signs."""
    f = codes_of(sae, params, x[:8192])
    return {
        **scores(sae, params, x),
        "two_signs": float(((f > 0).any(0) & (f < 0).any(0)).mean()),
        "directions": np.asarray(params["W_dec"], np.float32),
    }


def with_poles(run: dict[str, Any]) -> dict[str, Any]:
    """The run with the shares of axes of which a pole, and of which both, are found at 0.95."""
    C = cosines({"W_dec": run.pop("directions")}, axes_of(run["seed"]))
    up, down = C.max(0) >= 0.95, C.min(0) <= -0.95
    both = up | down if run["method"] == "abs_topk" else up & down
    return {**run, "axes": float((up | down).mean()), "both": float(both.mean())}


def run(small: bool) -> Found:
    compile_once()
    how = {"small": small, "how": SHORT_RUN, "score": both_signs}
    runs, grids = compared(
        sides(32, 96, 3), poles, steps=60 if small else 1000, batch=256, data="poles", **how
    )
    runs, rows = list(map(with_poles, runs)), pocket_rows(small)
    more, found = compared(
        sides(256, 512, 16), lambda seed: rows, steps=10 if small else 300, data="pocket-lm", **how
    )
    runs += [{k: v for k, v in one.items() if k != "directions"} for one in more]
    return judged(runs, grids + found)


def judged(runs: list[Mapping[str, Any]], grids: list[dict]) -> Found:
    """The verdict on every run's scores."""
    names, data = ("abs_topk", "topk", "topk 2n"), ("poles", "pocket-lm")
    fvu = {(at, name): of(runs, "fvu", data=at, method=name) for at in data for name in names}
    below = {
        (at, name): beyond(fvu[at, "abs_topk"], fvu[at, name]) for at in data for name in names[1:]
    }
    ours = "; ".join(
        f"{at}: " + ", ".join(f"{name} {told(fvu[at, name])}" for name in names) for at in data
    )
    both = ", ".join(
        f"{name} {told(of(runs, 'both', method=name, data='poles'), '.2f')}" for name in names
    )
    signs = told(of(runs, "two_signs", method="abs_topk", data="pocket-lm"), ".2f")
    yes, no = (
        "; ".join(", ".join(at) for at, is_below in below.items() if is_below == side) or "none"
        for side in (True, False)
    )
    why = (
        f"Below all seeds of: {yes}; not of: {no}. Axes whose two poles are found at cosine 0.95: "
        f"{both}; of AbsTopK's latents on pocket-lm {signs} fire with both signs."
    )
    holds = all(is_below for at, is_below in below.items() if at != ("pocket-lm", "topk 2n"))
    return Found(holds, "FVU, " + ours, why, runs, control, grids)


def control() -> tuple[bool, str]:
    """Orthonormal axes, as many latents: TopK has half of the poles."""
    D = orthonormal(32)
    x = drawn(exactly(32, 3, signed=True), D, 60_000, 0)[0]
    rows, both = (x[:40_000], x[40_000:50_000], x[50_000:]), sides(32, 32, 3)
    del both["topk 2n"]
    runs, _ = compared(both, lambda seed: rows, steps=800, batch=256, how=SHORT_RUN)
    fvu = {name: of(runs, "fvu", method=name) for name in both}
    text = ", ".join(f"{name} {told(v)}" for name, v in fvu.items())
    passed = beyond(fvu["abs_topk"], fvu["topk"])
    return passed, f"3 of 32 orthonormal axes of either sign, 32 latents: FVU {text}"


if __name__ == "__main__":
    main(STUDY, run)
