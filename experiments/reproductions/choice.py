"""Feature Choice and Mutual Choice: fewer dead latents than TopK, and a better reconstruction.

    python experiments/reproductions/choice.py

Rows: pocket-lm's residual stream after its second block.
"""

import itertools
import math
import statistics
from typing import Any

import numpy as np
from rates import SEEDS, SHORT_RUN, TUNED, compared
from study import Found, Study, beyond, compile_once, main, of, pocket_rows, told, tried
from sweep import BATCH, read_at
from synthetic import orthonormal, sums

from saex.sae import FeatureChoice, MutualChoice, TopK

STUDY = Study(
    name="choice",
    methods=("feature_choice", "mutual_choice", "topk"),
    claim="At equal sparsity Feature Choice and Mutual Choice have fewer dead latents and a lower "
    "reconstruction loss than TopK, Feature Choice (all but) none.",
    source="arXiv 2411.02124",
    paper="no figures at hand: fewer dead features and lower loss (abstract); 0% dead of 34M "
    "(from memory) for Feature Choice",
    own_text=False,
    baseline="TopK of the same width without AuxK at k 8 and with it at k 6, 8 and 10, read at the "
    f"L0 that each of the others has on held-out rows; all {TUNED.format('FVU')} at k 8; the width "
    "is such that TopK without AuxK has more than 10% dead: with fewer nothing is settled",
    says_no_if="Feature Choice has above 1% dead latents in a seed, or in a seed Feature or Mutual "
    "Choice has not fewer than all seeds of TopK without AuxK, or not a lower FVU than all seeds "
    "of TopK with AuxK at its L0",
)
D, N, K, STEPS = 256, 2048, 8, 300
DEAD = {"dead_after_tokens": 25_000}
LAW = {"density_rows": 25_000, "law_every": 10, "threshold_rate": 0.05}
NAMES = ("topk", "topk_aux", "mutual_choice", "feature_choice")


def made(name: str, k: int = K, d: int = D, n: int = N) -> Any:
    """``topk`` without AuxK, ``topk_aux`` with it."""
    if name.startswith("topk"):
        return TopK(d, n, k=k, aux_coefficient=(name == "topk_aux") / 32, **DEAD)
    cls = MutualChoice if name == "mutual_choice" else FeatureChoice
    return cls(d, n, k=k, **DEAD, **LAW)


def run(small: bool) -> Found:
    compile_once()
    rows, steps = pocket_rows(small), 20 if small else STEPS
    how = {"steps": steps, "batch": BATCH}
    saes = {name: made(name) for name in NAMES}
    runs, grids = compared(saes, lambda seed: rows, small=small, k=K, how=SHORT_RUN, **how)
    lr = next(grid["lr"] for grid in grids if grid["of"] == "topk_aux")
    for k, seed in itertools.product((K - 2, K + 2), SEEDS[:1] if small else SEEDS):
        sae, on = made("topk_aux", k), {"k": k, "lr": lr, "seed": seed}
        runs.append(tried("topk_aux", sae, rows[0], rows[2], **on, **how, **SHORT_RUN))
    return Found(True, "", "", runs) if small else judged(runs, grids)


def judged(runs: list, grids: list) -> Found:
    wrong = []
    parts = [f"{n}: dead {told(of(runs, 'dead', method=n, k=K), '.3f')}, "
             f"L0 {statistics.mean(of(runs, 'l0', method=n, k=K)):.1f}, "
             f"FVU {told(of(runs, 'fvu', method=n, k=K))}" for n in NAMES]  # fmt: skip
    for name in ("feature_choice", "mutual_choice"):
        dead, fvu = (of(runs, score, method=name) for score in ("dead", "fvu"))
        if not beyond(dead, of(runs, "dead", method="topk", k=K)):
            wrong.append(f"{name} has not fewer dead latents than TopK without AuxK")
        l0 = statistics.mean(of(runs, "l0", method=name))
        base = [at(runs, seed, l0) for seed in SEEDS]
        parts.append(f"TopK with AuxK at {name}'s L0: FVU {told(base)}")
        if not beyond(fvu, base):
            wrong.append(f"{name} has not a lower FVU than TopK with AuxK at its L0")
    if max(of(runs, "dead", method="feature_choice")) > 0.01:
        wrong.append("Feature Choice has above 1% dead")
    few = statistics.mean(of(runs, "dead", method="topk", k=K))
    why = "; ".join(wrong) or "All of it in every seed"
    why += f". TopK without AuxK has {few:.1%} dead at this width and length of run."
    holds = not wrong if few > 0.1 else None
    return Found(holds, "; ".join(parts), why, runs, control, grids)


def at(runs: list, seed: int, l0: float) -> float:
    """TopK's FVU with AuxK at an L0 between its k, at the nearest end if it lies outside."""
    mine = [r for r in runs if r["method"] == "topk_aux" and r["seed"] == seed]
    return read_at([{**r, "l0": r["k"]} for r in mine], "fvu", min(max(l0, K - 2), K + 2))


def control() -> tuple[bool, str]:
    """Rows of 1 to 15 orthonormal features: the same k for all of them must lose.

    And with four latents a feature Feature Choice, which gives each its rows, must have fewer dead
    ones than TopK without AuxK. (Mutual Choice was to have fewer too, until it was seen to do with
    a latent a feature.)
    """
    x = sums(orthonormal(64), 50_000, np.random.default_rng(1).integers(1, 16, 50_000), 0)[0]
    rows, how = (x[:40_000], x[40_000:45_000], x[45_000:]), {"steps": 500, "batch": BATCH}

    def runs_of(name: str, k: int, n: int) -> list:
        return compared({name: made(name, k, 64, n)}, lambda seed: rows, how=SHORT_RUN, **how)[0]

    parts, passed, unaided = [], True, of(runs_of("topk", 8, 256), "dead")
    for name in ("mutual_choice", "feature_choice"):
        runs = runs_of(name, 8, 64)
        k = math.ceil(statistics.mean(of(runs, "l0")) - 0.05)
        other, dead = of(runs_of("topk_aux", k, 64), "fvu"), of(runs_of(name, 8, 256), "dead")
        passed = passed and beyond(of(runs, "fvu"), other)
        passed = passed and (name == "mutual_choice" or beyond(dead, unaided))
        parts.append(f"{name} FVU {told(of(runs, 'fvu'))}, TopK with k {k} {told(other)}; "
                     f"of 256 latents {told(dead, '.3f')} dead")  # fmt: skip
    text = f"; TopK without AuxK {told(unaided, '.3f')}"
    return passed, "Rows of 1 to 15 of 64 orthonormal features: " + "; ".join(parts) + text


if __name__ == "__main__":
    main(STUDY, run)
