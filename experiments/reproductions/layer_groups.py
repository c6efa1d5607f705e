"""Layer groups: one dictionary for a group of similar layers against smaller ones of each layer.

    python experiments/reproductions/layer_groups.py

Data: the residual stream after pocket-lm's blocks but the last, on the standard library.
"""

import statistics
from typing import Any

import numpy as np
from rates import SEEDS, SHORT_RUN, TUNED, best_rate
from study import (
    Found,
    Study,
    beyond,
    compile_once,
    held_out,
    in_place,
    main,
    of,
    pocket,
    read,
    reconstructed,
    shuffled,
    told,
    trained,
)
from synthetic import directions, sums

from saex.evals.layer_groups import amad, angular_distances, fewest_groups
from saex.sae import MultiLayer

STUDY = Study(
    name="layer_groups",
    methods=("multi_layer",),
    claim="At equal parameters in all, dictionaries of groups of similar layers reconstruct their "
    "layers better than smaller ones of each layer.",
    source="arXiv 2410.21508 (Group-SAE; Ghilardi et al., EMNLP 2025)",
    paper="FVU 0.108 against 0.115 (Pythia 160M, 6 groups of 11 layers), 0.138 against 0.145 "
    "(410M)",
    own_text=False,
    baseline="a dictionary of each layer with as many latents as its share of its group's; every "
    f"dictionary sees as many rows at the same k; both {TUNED.format('mean FVU over layers')}",
    says_no_if="not every seed's mean FVU over layers is lower with groups than every seed's "
    "without, or no two layers are near enough (0.2) to be grouped",
)
SITES = tuple(f"blocks.{i}.resid_post" for i in range(3))
EACH, K, EXAMPLES = 256, 16, 768
GROUPS, ALONE = "groups", "layers"


def run(small: bool) -> Found:
    """Group the layers, then train both partitions of them."""
    compile_once()
    steps, rows = (10, 20_000) if small else (300, 200_000)
    train, test = pocket(SITES, rows, rows // 4)
    distances = angular_distances(train, SITES, 16_384, skip_positions=(0,))
    parts = {GROUPS: fewest_groups(distances), ALONE: [[i] for i in range(len(SITES))]}
    columns = read(train, **{site: site for site in SITES})
    cut = len(columns[SITES[0]]) // 20
    tune, columns = (
        {s: x[part] for s, x in columns.items()} for part in (slice(cut), slice(cut, None))
    )
    runs, grids = [], []
    for name, grouping in parts.items():
        lr = 3e-3
        if not small:

            def fvu(lr: float, grouping=grouping) -> float:
                found = fitted(columns, grouping, steps, lr, 0)
                return statistics.mean(fvu_of(*found[i], tune[SITES[i]]) for i in found)

            grids.append(best_rate(name, fvu))
            lr = grids[-1]["lr"]
        for seed in SEEDS[:1] if small else SEEDS:
            record = {"method": name, "groups": grouping, "lr": lr, "seed": seed}
            found = fitted(columns, grouping, steps, lr, seed)
            runs.append(record | scored(found, test, 4 if small else 32))
    return judge(runs, parts[GROUPS], amad(distances, parts[GROUPS]), distances, grids)


def fitted(
    columns: Any, grouping: Any, steps: int, lr: float, seed: int
) -> dict[int, tuple[Any, Any]]:
    """A dictionary and its params for each layer, one for all layers of a group."""
    found = {}
    for group in grouping:
        sae = MultiLayer(256, EACH * len(group), len(group), K, dead_after_tokens=100_000)
        x = np.concatenate([columns[SITES[i]] for i in group], axis=1)
        batches = shuffled({"x": x}, EXAMPLES // len(group), seed)
        params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed, **SHORT_RUN)
        found |= {i: (sae, params) for i in group}
    return found


def scored(found: dict[int, tuple[Any, Any]], test: Any, contexts: int) -> dict[str, Any]:
    """FVU and cross-entropy at each layer, and their means."""
    fvu, nats = {}, {}
    for i, one in found.items():
        held = held_out(test, SITES[i])
        fvu[SITES[i]] = reconstructed(*one, held)["fvu"]
        nats[SITES[i]] = in_place({0: one}, held, contexts)[0]
    means = {"fvu": statistics.mean(fvu.values()), "ce_increase": statistics.mean(nats.values())}
    return {"fvus": fvu, "ce_increases": nats, **means}


def control(steps: int = 300, d: int = 64, features: int = 128) -> tuple[bool, str]:
    """Mean FVU of two layers that hold the same features, more than half of the latents can."""
    x = [sums(directions(features, d), 20_000, 4, seed)[0] for seed in (1, 2)]
    out = {}
    for name, grouping in {GROUPS: [[0, 1]], ALONE: [[0], [1]]}.items():
        left = []
        for group in grouping:
            sae = MultiLayer(d, features // 2 * len(group), len(group), 4)
            rows = np.concatenate([x[i][4000:] for i in group], axis=1)
            batches = shuffled({"x": rows}, EXAMPLES // len(group), 0)
            params, _ = trained(sae, batches, steps=steps, lr=1e-2, seed=0)
            left += [fvu_of(sae, params, x[i][:4000]) for i in group]
        out[name] = statistics.mean(left)
    text = f"FVU {out[GROUPS]:.3f} of one dictionary, {out[ALONE]:.3f} of two of half its latents"
    return out[GROUPS] < out[ALONE], f"Two layers of the same features: {text}"


def fvu_of(sae: Any, params: Any, x: np.ndarray) -> float:
    y = np.asarray(sae.decode(params, sae.encode(params, x), x))
    return float(np.square(x - y).sum() / np.square(x - x.mean(0)).sum())


def judge(
    runs: list[dict[str, Any]], grouping: Any, spread: float, distances: Any, grids: Any
) -> Found:
    """FVU decides; cross-entropy is told."""
    fvu, nats = (
        {name: of(runs, score, method=name) for name in (GROUPS, ALONE)}
        for score in ("fvu", "ce_increase")
    )
    holds = len(grouping) < len(SITES) and beyond(fvu[GROUPS], fvu[ALONE])
    ours = f"FVU {told(fvu[GROUPS])} against {told(fvu[ALONE])}, groups {grouping}"
    why = (
        f"Angular distances: {distances[0, 1]:.3f} of the first two layers, {distances[0, 2]:.3f} "
        f"of the first and third (AMAD {spread:.3f}). Nats per token in place of a layer: "
        f"{told(nats[GROUPS])} with groups, {told(nats[ALONE])} without."
    )
    return Found(holds, ours, why, runs, control, grids)


if __name__ == "__main__":
    main(STUDY, run)
