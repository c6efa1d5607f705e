"""The variational SAE against TopK: a negative result of its authors.

    python experiments/reproductions/variational.py

Rows of pocket-lm at three k.
"""

import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import (
    Found,
    Study,
    beyond,
    compile_once,
    main,
    of,
    pocket_rows,
    told,
)

from saex.sae import TopK, Variational

STUDY = Study(
    name="variational",
    methods=("variational", "topk"),
    claim="TopK reconstructs better than the variational SAE at every k, and more of the latter's "
    "latents are dead.",
    source="arXiv 2509.22994",
    paper="Pythia-70M, k 64 to 512: TopK better at every k on explained variance and "
    "cross-entropy; about half of the variational SAE's latents alive at k 256",
    own_text=False,
    baseline=f"TopK of the same k, width, rows and steps; each {TUNED.format('FVU')}, for each k "
    "and weight of KL apart (the authors' weight in these units is not known; 1e-5 is saex's "
    "default)",
    says_no_if="at some k a seed of TopK is not below all seeds of the variational SAE with either "
    "weight of KL, or a seed of the latter's has as few dead latents with both weights",
)
N, KS, WEIGHTS = 512, (8, 16, 32), (1e-5, 1e-3)


def sides(k: int) -> dict:
    """TopK and the method with each weight of KL."""
    common = {"d_in": 256, "n": N, "k": k, "dead_after_tokens": 50_000}
    learned = {
        f"variational {w:g}": Variational(kl_coefficient=w, kl_warmup_steps=20, **common)
        for w in WEIGHTS
    }
    return {"topk": TopK(**common), **learned}


def run(small: bool) -> Found:
    compile_once()
    train, choose, test = pocket_rows(small)
    choose, test = choose[:5000], test[:15_000]
    runs, grids = [], []
    how = {"steps": 10 if small else 250, "small": small, "how": SHORT_RUN}
    for k in KS:
        found, grid = compared(sides(k), lambda seed: (train, choose, test), k=k, **how)
        runs, grids = runs + found, grids + [{**g, "of": f"{g['of']}, k {k}"} for g in grid]
    return judged(runs, grids)


def judged(runs: list[dict], grids: list[dict]) -> Found:
    """The verdict on every run's scores."""
    names = list(sides(KS[0]))

    def got(score: str, name: str, k: int) -> list[float]:
        return of(runs, score, method=name, k=k)

    worse = {
        name: all(beyond(got("fvu", "topk", k), got("fvu", name, k)) for k in KS)
        for name in names[1:]
    }
    more_dead = {
        name: all(beyond(got("dead", "topk", k), got("dead", name, k)) for k in KS)
        for name in names[1:]
    }
    ours = "; ".join(
        f"k {k}: "
        + ", ".join(
            f"{name} FVU {told(got('fvu', name, k))} dead {np.mean(got('dead', name, k)):.3f}"
            for name in names
        )
        for k in KS
    )
    every = {True: "at every k", False: "not at every k"}
    why = "; ".join(
        f"TopK's FVU is below that of {name} {every[worse[name]]}, its dead latents are fewer "
        f"{every[more_dead[name]]}"
        for name in names[1:]
    )
    return Found(
        all(worse.values()) and any(more_dead.values()), ours, why + ".", runs, rates=grids
    )


if __name__ == "__main__":
    main(STUDY, run)
