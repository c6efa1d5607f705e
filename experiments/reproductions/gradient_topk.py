"""Gradient SAE against TopK: what the model loses with the reconstruction in place, at equal k.

    python experiments/reproductions/gradient_topk.py

Data: pocket-lm's residual stream after block 1 and the gradient of its loss there, on the standard
library; in the control, sums of random directions of which the loss sees the smallest alone.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import (
    SITE,
    Found,
    Study,
    beyond,
    compile_once,
    held_out,
    in_place,
    main,
    of,
    parted,
    pocket,
    read,
    told,
)
from synthetic import directions

from saex.sae import GradientTopK, TopK

STUDY = Study(
    name="gradient_topk",
    methods=("gradient_topk", "topk"),
    claim="At equal k the model loses less with the gradient SAE's reconstruction in place than "
    "with TopK's.",
    source="arXiv 2411.10397 (Olmo et al., Findings of NAACL 2025)",
    paper="lower cross-entropy degradation than other architectures at equal sparsity (abstract)",
    own_text=False,
    baseline="TopK of the same width, k, rows and steps, from the same six seeds: both begin with "
    f"the same weights and read the same rows in the same order; both {TUNED.format('nats')}; beta "
    "stays at its default 1; both encode without gradients in place",
    says_no_if="the mean over six seeds of the gradient SAE's nats less TopK's of the same seed is "
    "not below 0 by more than 2.57 of its standard errors (95% of t with five degrees of freedom)",
)
D, N, K, STEPS, SEEDS, T95 = 256, 512, 16, 300, (1, 2, 3, 4, 5, 6), 2.57
GRADIENT, TOPK = "gradient_topk", "topk"


def run(small: bool) -> Found:
    compile_once()
    rows, contexts = (20_000, 4) if small else (100_000, 64)
    train, test = pocket((SITE,), rows, rows // 4, gradients=(SITE,))
    names = {"x": SITE, "gradient": f"{SITE}.gradient"}
    held, apart = read(test, **names), parted(held_out(test))
    tune, judge = (
        {**held, "held": h, "contexts": count} for h, count in zip(apart, (contexts // 3, contexts))
    )
    columns = read(train, **names)
    runs, grids = compared(
        sides(D, N, K),
        lambda seed: (columns, tune, judge),
        steps=10 if small else STEPS,
        small=small,
        seeds=SEEDS,
        by="ce_increase",
        how=SHORT_RUN,
        score=scored,
    )
    return Found(True, "", "", runs) if small else judged(runs, grids)


def sides(d: int, n: int, k: int) -> dict[str, Any]:
    how = {"d_in": d, "n": n, "k": k, "dead_after_tokens": 100_000}
    return {TOPK: TopK(**how), GRADIENT: GradientTopK(**how)}


def scored(sae: Any, params: Any, rows: Mapping[str, Any]) -> dict[str, float]:
    nats = in_place({"": (sae, params)}, rows["held"], rows["contexts"])[""]
    return {"ce_increase": nats, **errors(sae, params, rows)}


def errors(sae: Any, params: Any, test: Any, rows: int = 16_384) -> dict[str, float]:
    """FVU, dead latents, and the first-order change of the loss |<g, x - x'>|, mean over rows.

    ``by_effect`` beside them: with the choice of training, which sees gradients.
    """
    x, g = test["x"][:rows], test["gradient"][:rows]
    codes = {"": jax.jit(sae.encode)(params, x)}
    if isinstance(sae, GradientTopK):
        codes["_by_effect"] = jax.jit(sae.encode_by_effect)(params, (x, g))
    out = {"dead": float(1 - np.asarray(codes[""].dense(sae.n) != 0).any(0).mean())}
    for how, code in codes.items():
        left = x - np.asarray(sae.decode(params, code))
        out[f"fvu{how}"] = float(np.square(left).sum() / np.square(x - x.mean(0)).sum())
        out[f"first_order{how}"] = float(np.abs((g * left).sum(1)).mean())
    return out


def control(d: int = 64, features: int = 128, k: int = 4) -> tuple[bool, str]:
    """What the loss loses, to first order, where it sees small features alone.

    Half of the features are half as large and all that the gradient, of random sign, points
    along: who chooses by effect must keep them.
    """
    rng, rows = np.random.default_rng(7), 40_000
    rank = np.stack([rng.random((rows, features // 2)).argsort(1) for _ in range(2)], axis=1)
    f = np.where(rank < k, rng.uniform(0.5, 1.5, rank.shape), 0) * [[[1.0], [0.5]]]
    f = f.reshape(rows, features)
    W = directions(features, d).astype(np.float64)
    seen = np.where(np.arange(features) < features // 2, 0.0, f)
    signs = rng.choice([-1.0, 1.0], seen.shape)
    data = {"x": f @ W, "gradient": (signs * (seen > 0)) @ W}
    data = {name: column.astype(np.float32) for name, column in data.items()}
    parts = [slice(8000, None), slice(4000), slice(4000, 8000)]
    apart = [{n: c[part] for n, c in data.items()} for part in parts]
    how = {"steps": STEPS, "how": SHORT_RUN, "by": "first_order", "score": errors}
    runs, _ = compared(sides(d, features, k), lambda seed: apart, **how)
    ours, theirs = (of(runs, "first_order", method=name) for name in (GRADIENT, TOPK))
    text = f"|<g, error>| {told(ours, '.3f')}, TopK {told(theirs, '.3f')}"
    return beyond(ours, theirs), f"Where the loss sees small features alone: {text}"


def judged(runs: list[dict[str, Any]], grids: list) -> Found:
    """Cross-entropy decides; the other figures say why."""

    def pair(score: str) -> tuple[list[float], list[float]]:
        return of(runs, score, method=GRADIENT), of(runs, score, method=TOPK)

    ours, theirs = pair("ce_increase")
    less = [a - b for a, b in zip(ours, theirs)]
    mean, error = statistics.mean(less), statistics.stdev(less) / len(less) ** 0.5
    line = (
        f"k {K}: {told(ours)} nats against {told(theirs)}; of the same seed {mean:+.4f}, standard "
        f"error {error:.4f}, less in {sum(each < 0 for each in less)} of {len(less)}"
    )
    beside = ", ".join(
        f"{name} " + " against ".join(f"{statistics.mean(side):.3f}" for side in pair(score))
        for name, score in (("FVU", "fvu"), ("dead", "dead"), ("|<g, error>|", "first_order"))
    )
    return Found(mean + T95 * error < 0, line, f"{beside}.", runs, control, grids)


if __name__ == "__main__":
    main(STUDY, run)
