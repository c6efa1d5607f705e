"""Skip transcoder against a transcoder without the linear path, and an SAE: FVU at equal k.

    python experiments/reproductions/skip_transcoder.py

Data: input and output of block 1's MLP in pocket-lm, on the standard library.
"""

import statistics
from typing import Any

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
    "parameters for; both with the better of two learning rates (FVU of seed 0), same "
    "rows and steps; a TopK SAE of the output beside them",
    says_no_if="at k 16 not every seed with the path has a lower FVU than every seed without",
)
IN, OUT = "blocks.1.mlp_in", "blocks.1.mlp_out"
RATES, KS = (2e-3, 4e-3), (16,)
D, N, BATCH = 256, 512, 512
ARMS = ("skip", "plain", "sae")


def run(small: bool) -> Found:
    """Every arm at each k, seed 0 at both rates and two more seeds at the better one."""
    compile_once()
    steps, rows = (10, 20_000) if small else (300, 200_000)
    train, test = pocket((IN, OUT), rows, rows // 4)
    columns, runs, done = read(train, x=IN, y=OUT), [], {}
    rates, seeds, contexts = (RATES[:1], [1], 4) if small else (RATES, [1, 2], 32)
    helds = {arm: held_out(test, OUT) if arm == "sae" else held_out(test, IN, OUT) for arm in ARMS}
    for arm in ARMS:
        for k in KS:
            found = [one(arm, k, lr, 0, columns, helds[arm], steps) for lr in rates]
            best = min(found, key=lambda pair: pair[0]["fvu"])[0]["lr"]
            found += [one(arm, k, best, seed, columns, helds[arm], steps) for seed in seeds]
            runs += [record | {"chosen": record["lr"] == best} for record, _ in found]
            done |= {(arm, k, record["lr"], record["seed"]): pair for record, pair in found}
    spliced(runs, done, helds, contexts)
    return judge(runs)


def one(arm: str, k: int, lr: float, seed: int, columns: Any, held: Any, steps: int) -> Any:
    """(the run's record, (sae, params))."""
    sae, x = dictionary(arm, k), {"x": columns["y"]} if arm == "sae" else columns
    params, _ = trained(sae, shuffled(x, BATCH, seed), steps=steps, lr=lr, seed=seed)
    settings = {"method": arm, "k": k, "n": sae.n, "lr": lr, "seed": seed}
    return settings | reconstructed(sae, params, held), (sae, params)


def dictionary(arm: str, k: int) -> Any:
    """The path has D * D parameters, a latent 2 D: without it there are D / 2 latents more."""
    how = {"k": k, "dead_after_tokens": 100_000, "aux_coefficient": 1 / 32}
    if arm == "sae":
        return TopK(D, N, **how)
    return SkipTranscoder(D, D, N if arm == "skip" else N + D // 2, skip=arm == "skip", **how)


def spliced(runs: list[dict[str, Any]], done: Any, helds: Any, contexts: int) -> None:
    """Write into the chosen runs what each costs in place of the MLP's output."""
    for arm in ARMS:
        picked = [r for r in runs if r["method"] == arm and r["chosen"]]
        keys = [(arm, r["k"], r["lr"], r["seed"]) for r in picked]
        nats = in_place({key: done[key] for key in keys}, helds[arm], contexts)
        for record, key in zip(picked, keys):
            record["ce_increase"] = nats[key]


def judge(runs: list[dict[str, Any]]) -> Found:
    """FVU decides; cross-entropy and the SAE are told."""
    lower, lines, beside = [], [], []
    for k in KS:
        fvu, nats = (
            {arm: of(runs, score, method=arm, k=k, chosen=True) for arm in ARMS}
            for score in ("fvu", "ce_increase")
        )
        lower.append(beyond(fvu["skip"], fvu["plain"]))
        lines.append(f"k {k}: FVU {told(fvu['skip'])} with the path, {told(fvu['plain'])} without")
        costs = ", ".join(f"{arm} {statistics.mean(nats[arm]):.4f}" for arm in ARMS)
        beside.append(f"k {k}: {costs}")
    why = "Nats per token in place of the MLP's output: " + "; ".join(beside) + "."
    return Found(all(lower), "; ".join(lines), why, runs)


if __name__ == "__main__":
    main(STUDY, run)
