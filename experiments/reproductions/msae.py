"""MSAE's nested k: one dictionary read at many k, against TopK trained at one.

    python experiments/reproductions/msae.py

Rows of pocket-lm; all are read with k 8, 16, 32 and 64.
"""

from typing import Any

import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import Found, Study, beyond, compile_once, main, of, pocket_rows, scores, told

from saex.sae import MSAE, TopK

STUDY = Study(
    name="msae",
    methods=("msae", "topk"),
    claim="One MSAE is good at many k at once: over k 8 to 64 it reconstructs better than any "
    "dictionary that TopK trained at one of them.",
    source="arXiv 2502.20578",
    paper="CLIP ViT-L/14: a better front of FVU and sparsity than ReLU, TopK and BatchTopK; FVU "
    "below 0.1 at about 80% zeros",
    own_text=True,
    baseline="TopK trained at k 8, 16, 32 or 64, same width, rows and steps; each "
    f"{TUNED.format('FVU')}, MSAE's over all four k, TopK's at the k of its training",
    says_no_if="a seed of MSAE does not have a lower geometric mean of FVU over the four k than "
    "all seeds of each TopK",
)
N, KS = 512, (8, 16, 32, 64)
COMMON = {"d_in": 256, "n": N, "dead_after_tokens": 50_000}
SAES = {
    "msae": MSAE(k=8, levels=(1, 2, 4, 8), **COMMON),
    **{f"topk {k}": TopK(k=k, **COMMON) for k in KS},
}


def read_with(sae: Any, params: Any, x: np.ndarray) -> dict[str, float]:
    """FVU at each k, their geometric mean, and by which the rate is chosen."""
    each = {k: scores(TopK(k=k, **COMMON), params, x)["fvu"] for k in KS}
    over_all = float(np.exp(np.mean(np.log(list(each.values())))))
    choice = each[sae.k] if isinstance(sae, TopK) else over_all
    return {"choice": choice, "fvu": over_all, **{f"fvu_{k}": fvu for k, fvu in each.items()}}


def run(small: bool) -> Found:
    compile_once()
    train, tune, test = pocket_rows(small)
    rows, how = (train, tune[:5000], test[:15_000]), {"score": read_with, "by": "choice"}
    steps = 10 if small else 300
    runs, grids = compared(SAES, lambda seed: rows, steps=steps, small=small, how=SHORT_RUN, **how)
    got = {name: of(runs, "fvu", method=name) for name in SAES}
    holds = all(beyond(got["msae"], got[f"topk {k}"]) for k in KS)
    ours = "geometric mean of FVU over k: " + ", ".join(f"{k} {told(v)}" for k, v in got.items())
    ratio = {
        k: np.mean(of(runs, f"fvu_{k}", method="msae"))
        / np.mean(of(runs, f"fvu_{k}", method=f"topk {k}"))
        for k in KS
    }
    told_ratio = ", ".join(f"{r - 1:+.1%} at {k}" for k, r in ratio.items())
    why = f"FVU against the TopK trained for that k: {told_ratio}."
    return Found(holds, ours, why, runs, rates=grids)


if __name__ == "__main__":
    main(STUDY, run)
