"""Gradient SAE against TopK: what the model loses with the reconstruction in place, at equal k.

    python experiments/reproductions/gradient_topk.py

Data: pocket-lm's residual stream after block 1 and the gradient of its loss there, on the standard
library; in the control, sums of random directions of which the loss sees the smallest alone.
"""

import functools
import statistics
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
    shuffled,
    told,
    trained,
)
from synthetic import directions

from saex.sae import GradientTopK, TopK

STUDY = Study(
    name="gradient_topk",
    methods=("gradient_topk",),
    claim="At equal k the model loses less with the gradient SAE's reconstruction in place than "
    "with TopK's.",
    source="arXiv 2411.10397 (Olmo et al., Findings of NAACL 2025)",
    paper="lower cross-entropy degradation than other architectures at equal sparsity (abstract)",
    own_text=False,
    baseline="TopK of the same width, rows and steps; both "
    f"{TUNED.format('cross-entropy')} (text apart); beta stays at its default 1 (0.3 and 3, at "
    "beta 1's rate, are only told); both encode without gradients in place",
    says_no_if="at k 16 not every seed of the gradient SAE raises cross-entropy by less than "
    "every seed of TopK",
)
K = 16
D, N, BATCH = 256, 512, 512
GRADIENT, TOPK = "gradient_topk", "topk"


def run(small: bool) -> Found:
    """Both at their best rates, and two more betas at the rate of the default."""
    compile_once()
    steps, rows = (10, 20_000) if small else (300, 100_000)
    train, heldout = pocket((SITE,), rows, rows // 4, gradients=(SITE,))
    names = {"x": SITE, "gradient": f"{SITE}.gradient"}
    columns, apart = read(train, **names), read(heldout, **names)
    cut = len(apart["x"]) // 5
    parts = ({n: c[part] for n, c in apart.items()} for part in (slice(cut), slice(cut, None)))
    tune, test = zip(parts, parted(held_out(heldout)))
    how = {"steps": steps, "small": small, "by": "ce_increase", "batch": BATCH, "how": SHORT_RUN}
    score = functools.partial(scored, contexts=4 if small else 32)
    sides = {TOPK: dictionary(TOPK, D, N, K), GRADIENT: dictionary(GRADIENT, D, N, K)}
    runs, grids = compared(sides, lambda seed: (columns, tune, test), **how, score=score)
    for beta in (0.3, 3.0):
        sae = dictionary(GRADIENT, D, N, K, beta)
        params = fitted(sae, columns, steps, grids[-1]["lr"], 1)
        runs.append({"method": "beta", "beta": beta, "seed": 1, **score(sae, params, test)})
    return judge(runs, grids)


def scored(sae: Any, params: Any, part: Any, contexts: int) -> dict[str, float]:
    """``errors`` of rows, and what the dictionary costs in place, by text."""
    rows, held = part
    nats = in_place({"": (sae, params)}, held, contexts)
    return errors(sae, params, rows) | {"ce_increase": nats[""]}


def fitted(sae: Any, columns: Any, steps: int, lr: float, seed: int) -> Any:
    batches = shuffled({name: columns[name] for name in sae.columns}, BATCH, seed)
    return trained(sae, batches, steps=steps, lr=lr, seed=seed, **SHORT_RUN)[0]


def dictionary(name: str, d: int, n: int, k: int, beta: float = 1.0) -> Any:
    how = {"k": k, "dead_after_tokens": 100_000}
    return TopK(d, n, **how) if name == TOPK else GradientTopK(d, n, beta=beta, **how)


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


def control(steps: int = 300, d: int = 64, features: int = 128) -> tuple[bool, str]:
    """Share of the loss's part of rows that is lost, where the loss sees small features alone.

    Half of the features are half as large and all that the gradient, of random sign, points
    along: who chooses by effect must keep them.
    """
    rng, rows, k = np.random.default_rng(7), 40_000, 4
    rank = np.stack([rng.random((rows, features // 2)).argsort(1) for _ in range(2)], axis=1)
    f = np.where(rank < k, rng.uniform(0.5, 1.5, rank.shape), 0) * [[[1.0], [0.5]]]
    f = f.reshape(rows, features)
    D = directions(features, d).astype(np.float64)
    seen = np.where(np.arange(features) < features // 2, 0.0, f)
    signs = rng.choice([-1.0, 1.0], seen.shape)
    data = {"x": f @ D, "gradient": (signs * (seen > 0)) @ D}
    data = {name: column.astype(np.float32) for name, column in data.items()}
    train, test = ({n: c[s] for n, c in data.items()} for s in (slice(4000, None), slice(4000)))
    out = {}
    for name in (TOPK, GRADIENT):
        sae = dictionary(name, d, features, k)
        params = fitted(sae, train, steps, 1e-2, 0)
        out[name] = errors(sae, params, test)
    ours, plain, topk = (
        out[GRADIENT]["first_order_by_effect"],
        out[GRADIENT]["first_order"],
        out[TOPK]["first_order"],
    )
    return plain < topk, (
        f"Where the loss sees small features alone: |<g, error>| {ours:.3f} by effect, {plain:.3f} "
        f"without gradients, TopK {topk:.3f}."
    )


def judge(runs: list[dict[str, Any]], grids: list[dict[str, Any]]) -> Found:
    """Cross-entropy decides; the other figures say why."""
    figures = {
        score: [of(runs, score, method=name) for name in (GRADIENT, TOPK)]
        for score in ("ce_increase", "fvu", "dead", "first_order")
    }
    ours, theirs = map(told, figures["ce_increase"])
    fvu, dead, first = (against(figures[s]) for s in ("fvu", "dead", "first_order"))
    betas = {run["beta"]: run["ce_increase"] for run in runs if run["method"] == "beta"}
    why = f"FVU {fvu}, dead {dead}, |<g, error>| {first}. One seed, told alone: " + ", ".join(
        f"beta {beta:g} {nats:.4f} nats" for beta, nats in betas.items()
    )
    line = f"k {K}: {ours} nats against {theirs}"
    return Found(beyond(*figures["ce_increase"]), line, why + ".", runs, control, grids)


def against(pair: Any) -> str:
    return " against ".join(f"{statistics.mean(values):.3f}" for values in pair)


if __name__ == "__main__":
    main(STUDY, run)
