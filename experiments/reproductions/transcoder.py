"""Transcoder against an SAE of the same MLP: what the model loses with each in its place.

    python experiments/reproductions/transcoder.py

Data: input and output of block 1's MLP in pocket-lm, on the standard library.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rates import SEEDS, SHORT_RUN, TUNED, around, best_rate, compared, penalty_at
from study import (
    Found,
    Study,
    at_l0,
    beyond,
    compile_once,
    held_out,
    in_place,
    main,
    of,
    parted,
    pocket,
    read,
    reconstructed,
    scores,
    shuffled,
    told,
    trained,
)
from synthetic import directions, sums

from saex.sae import ReLU, Transcoder

STUDY = Study(
    name="transcoder",
    methods=("transcoder",),
    claim="At equal L0 the model loses no more with a transcoder in place of its MLP than with an "
    "SAE's reconstruction of that MLP's output.",
    source="arXiv 2406.11944 (Dunefsky, Chlenski, Nanda 2024)",
    paper="match or beat SAEs in cross-entropy over L0 (figures)",
    own_text=False,
    baseline="SAE with ReLU and L1 on the MLP's output, same width (twice the MLP's), rows and "
    f"steps; both {TUNED.format('nats')} (text apart) at L0 24, between two penalties, and then "
    "with two penalties about L0 12 and 42",
    says_no_if="at L0 16 or 32, between the penalties, every seed of the SAE raises cross-entropy "
    "by less than every seed of the transcoder",
)
IN, OUT = "blocks.1.mlp_in", "blocks.1.mlp_out"
LEVELS, MIDDLE = (16, 32), 24
START = {"sae": 0.06, "transcoder": 0.03}
N, BATCH, STEPS = 2048, 512, 250


def run(small: bool) -> Found:
    """Find both rates at the middle L0, then read both at equal L0."""
    compile_once()
    steps, rows, contexts = (10, 20_000, 4) if small else (STEPS, 200_000, 32)
    train, test = pocket((IN, OUT), rows, rows // 4)
    columns, runs, grids = read(train, x=IN, y=OUT), [], []
    for name in START:
        texts = parted(held_out(test, OUT) if name == "sae" else held_out(test, IN, OUT))
        x = {"x": columns["y"]} if name == "sae" else columns
        if small:
            runs.append(one(name, START[name], 3e-3, 1, x, texts[1], steps, contexts))
            continue
        near: dict[float, list[dict[str, Any]]] = {}

        def nats(lr: float, name=name, x=x, held=texts[0], near=near) -> float:
            near[lr] = around(
                lambda at: one(name, at, lr, 0, x, held, steps, 16), START[name], MIDDLE
            )
            return at(near[lr], MIDDLE)

        grids.append(best_rate(name, nats))
        lr = grids[-1]["lr"]
        ends = [penalty_at(near[lr], l0) for l0 in (1.3 * max(LEVELS), min(LEVELS) / 1.3)]
        for l1, seed in itertools.product(ends, SEEDS):
            runs.append(one(name, l1, lr, seed, x, texts[1], steps, contexts))
    return Found(True, "", "", runs) if small else judge(runs, grids)


def one(
    name: str, l1: float, lr: float, seed: int, x: Any, held: Any, steps: int, contexts: int
) -> dict[str, Any]:
    """A run's record."""
    sae = dictionary(name, l1, steps)
    params, _ = trained(sae, shuffled(x, BATCH, seed), steps=steps, lr=lr, seed=seed, **SHORT_RUN)
    nats = in_place({"": (sae, params)}, held, contexts)
    costs = {"ce_increase": nats[""], "ce_mean_ablated": nats["mean"]}
    settings = {"method": name, "penalty": l1, "lr": lr, "seed": seed}
    return settings | reconstructed(sae, params, held, 16_384) | costs


def dictionary(name: str, l1: float, steps: int) -> Any:
    how = {"l1": l1, "l1_warmup_steps": steps // 4, "dead_after_tokens": 100_000}
    return ReLU(256, N, **how) if name == "sae" else Transcoder(256, 256, N, **how)


def at(runs: Sequence[Mapping[str, Any]], l0: float, score: str = "ce_increase") -> float:
    return at_l0([(run["l0"], run[score]) for run in runs], l0)


def control(d: int = 64, d_out: int = 16, features: int = 128) -> tuple[bool, str]:
    """FVU of both where the input tells the features apart and the narrow output cannot."""
    x, codes = sums(directions(features, d, seed=1), 24_000, 4, seed=1)
    y = codes @ directions(features, d_out, seed=2)
    parts = (slice(8000, None), slice(4000), slice(4000, 8000))
    data = [{"x": x[part], "y": y[part]} for part in parts]
    runs: list[dict[str, Any]] = []
    for name, l1 in {"sae": 0.3, "transcoder": 0.1}.items():
        how = {"l1": l1, "l1_warmup_steps": 100}
        wide = Transcoder(d, d_out, features, **how)
        sae = ReLU(d_out, features, **how) if name == "sae" else wide
        rows = [{"x": part["y"], "y": part["y"]} for part in data] if name == "sae" else data
        runs += compared(
            {name: sae},
            lambda seed, rows=rows: rows,
            steps=800,
            how=SHORT_RUN,
            score=lambda sae, params, part: scores(sae, params, part["x"], part["y"]),
        )[0]
    fvu, l0 = ({n: of(runs, s, method=n) for n in START} for s in ("fvu", "l0"))
    text = ", ".join(
        f"{n} FVU {told(fvu[n], '.3f')} at L0 {statistics.mean(l0[n]):.1f}" for n in fvu
    )
    passed = beyond(fvu["transcoder"], fvu["sae"]) and beyond(l0["transcoder"], l0["sae"])
    return passed, f"Where the input tells features apart and the narrow output does not: {text}"


def judge(runs: list[dict[str, Any]], grids: list) -> Found:
    """Cross-entropy at each L0."""

    def read_off(name: str, l0: float, score: str) -> list[float]:
        mine = [[r for r in runs if r["method"] == name and r["seed"] == s] for s in SEEDS]
        return [at(each, l0, score) for each in mine]

    lost, better, lines = [], [], []
    for l0 in LEVELS:
        sae, coder = (
            {score: read_off(name, l0, score) for score in ("ce_increase", "fvu")} for name in START
        )
        lost.append(beyond(sae["ce_increase"], coder["ce_increase"]))
        better.append(beyond(coder["ce_increase"], sae["ce_increase"]))
        lines.append(
            f"L0 {l0}: {told(coder['ce_increase'])} nats against {told(sae['ce_increase'])} (FVU "
            f"{np.mean(coder['fvu']):.3f} against {np.mean(sae['fvu']):.3f})"
        )
    ablated = runs[0]["ce_mean_ablated"]
    why = (
        f"The mean in place costs {ablated:.3f} nats. The transcoder is better beyond seeds at "
        f"{sum(better)} and worse at {sum(lost)} of {len(LEVELS)} levels; unlike the SAE it does "
        "not see the output that it reconstructs."
    )
    return Found(not any(lost), "; ".join(lines), why, runs, control, grids)


if __name__ == "__main__":
    main(STUDY, run)
