"""Skip transcoder against a transcoder without the linear path, and an SAE: FVU at equal k.

    python experiments/reproductions/skip_transcoder.py

Data: input and output of block 1's MLP in pocket-lm, on the standard library.
"""

import statistics
from typing import Any

import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import (
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
    scores,
    told,
)
from synthetic import directions, orthonormal, sums

from saex.sae import SkipTranscoder, TopK

STUDY = Study(
    name="skip_transcoder",
    methods=("skip_transcoder",),
    claim="At equal k and parameters, a transcoder with a linear path predicts the MLP's output "
    "with lower FVU than one without.",
    source="arXiv 2501.18823 (Paulo, Shabalin, Belrose 2025)",
    paper="a Pareto gain in FVU over k (figures)",
    own_text=False,
    baseline="TopK transcoder without the path, wider by as many latents as the path has "
    "parameters for, same rows and steps; a TopK SAE of the output beside them; each "
    f"{TUNED.format('FVU')}",
    says_no_if="at k 16 not every seed with the path has a lower FVU than every seed without",
)
IN, OUT = "blocks.1.mlp_in", "blocks.1.mlp_out"
K, D, N, STEPS = 16, 256, 512, 300
ARMS = ("skip", "plain", "sae")


def run(small: bool) -> Found:
    """Every arm: its rate by the first fifth of the held-out rows, its scores by the others."""
    compile_once()
    rows, runs, grids = 20_000 if small else 200_000, [], []
    steps, contexts = (10, 4) if small else (STEPS, 32)
    stores = pocket((IN, OUT), rows, rows // 4)
    columns, held = (read(store, x=IN, y=OUT) for store in stores)
    cut = len(held["x"]) // 5
    for arm in ARMS:
        x, site = ("y", OUT) if arm == "sae" else ("x", IN)
        train, apart = ({"x": c[x], "y": c["y"]} for c in (columns, held))
        tune, test = ({k: v[p] for k, v in apart.items()} for p in (slice(cut), slice(cut, None)))
        text = parted(held_out(stores[1], site, OUT))[1]
        data = train, (tune, None), (test, text)
        found, grid = compared(
            {arm: dictionary(arm)},
            lambda seed, data=data: data,
            steps=steps,
            small=small,
            how=SHORT_RUN,
            score=lambda sae, params, part: scored(sae, params, *part, contexts),
            k=K,
        )
        runs, grids = runs + found, grids + grid
    return judge(runs, grids)


def scored(sae: Any, params: Any, rows: Any, text: Any, contexts: int) -> dict[str, float]:
    """Scores and, where there is text, what the dictionary costs in place of the MLP's output."""
    found = {"n": sae.n, **scores(sae, params, rows["x"], rows["y"])}
    if text is not None:
        found["ce_increase"] = in_place({"": (sae, params)}, text, contexts)[""]
    return found


def dictionary(arm: str) -> Any:
    """The path has D * D parameters, a latent 2 D: without it there are D / 2 latents more."""
    how = {"k": K, "dead_after_tokens": 100_000, "aux_coefficient": 1 / 32}
    if arm == "sae":
        return TopK(D, N, **how)
    return SkipTranscoder(D, D, N if arm == "skip" else N + D // 2, skip=arm == "skip", **how)


def judge(runs: list[dict[str, Any]], grids: list[dict[str, Any]]) -> Found:
    """FVU decides; cross-entropy and the SAE are told."""
    fvu, nats = (
        {arm: of(runs, score, method=arm) for arm in ARMS} for score in ("fvu", "ce_increase")
    )
    ours = f"k {K}: FVU {told(fvu['skip'])} with the path, {told(fvu['plain'])} without"
    costs = ", ".join(f"{arm} {statistics.mean(nats[arm]):.4f}" for arm in ARMS)
    why = (
        f"The SAE, which sees the output: FVU {told(fvu['sae'])}. Nats per token in place of the "
        f"MLP's output: {costs}."
    )
    return Found(beyond(fvu["skip"], fvu["plain"]), ours, why, runs, control, grids)


def control(d: int = 64, features: int = 128) -> tuple[bool, str]:
    """FVU of both where the output is the sparse features' sum and a linear map of dense rows."""
    x, codes = sums(directions(features, d, seed=1), 24_000, 4, seed=1)
    dense = np.random.default_rng(3).normal(size=x.shape).astype(np.float32) / np.sqrt(d)
    x, y = x + dense, codes @ directions(features, d, seed=2) + dense @ orthonormal(d, 3)
    parts = (slice(8000, None), slice(4000), slice(4000, 8000))
    data = [{"x": x[part], "y": y[part]} for part in parts]
    sides = {
        arm: SkipTranscoder(d, d, features + (arm == "plain") * d // 2, k=4, skip=arm == "skip")
        for arm in ARMS[:2]
    }
    runs, _ = compared(
        sides,
        lambda seed: data,
        steps=800,
        how=SHORT_RUN,
        score=lambda sae, params, part: scores(sae, params, part["x"], part["y"]),
    )
    fvu = {arm: of(runs, "fvu", method=arm) for arm in sides}
    text = ", ".join(f"{arm} {told(v, '.3f')}" for arm, v in fvu.items())
    return beyond(fvu["skip"], fvu["plain"]), f"Sparse features and a dense linear part: FVU {text}"


if __name__ == "__main__":
    main(STUDY, run)
