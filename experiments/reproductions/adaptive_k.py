"""AdaptiveK: latents by a probe's complexity, against the same k for all rows.

    python experiments/reproductions/adaptive_k.py

Rows: pocket-lm's residual stream after its second block. Complexity, for which the paper asks a
language model, is here the compressed size of the last 64 bytes of source text.
"""

import zlib

import jax.numpy as jnp
import numpy as np
from rates import SHORT_RUN, TUNED, compared
from study import (
    SITE,
    Found,
    Study,
    beyond,
    main,
    of,
    pocket,
    read,
    scores,
    told,
)
from sweep import BATCH
from synthetic import directions, sums

from saex.sae import AdaptiveK, BatchTopK, TopK
from saex.sae.transform import estimate_threshold

STUDY = Study(
    name="adaptive_k",
    methods=("adaptive_k", "topk", "batch_topk"),
    claim="A number of latents that a linear probe of complexity sets for each row reconstructs "
    "better than the same number for all rows, at equal mean L0.",
    source="arXiv 2508.17320",
    paper="better L2, explained variance and cosine than fixed sparsities (abstract; no figures)",
    own_text=False,
    baseline="TopK and BatchTopK of the same width with k the mean L0 of AdaptiveK, and AdaptiveK "
    "with a random direction of the rows in place of complexity, of the same distribution; all "
    f"without L1, {TUNED.format('FVU')}; "
    "BatchTopK's threshold is found anew after training so that it gives k on a twentieth of the "
    "rows, in place of its running one",
    says_no_if="a seed of AdaptiveK is not below all seeds of TopK, or not below all seeds of the "
    "random direction",
)
N, WINDOW = 512, 64
K = {"k_min": 4, "k_max": 60, "l1": 0.0}
DEAD = {"dead_after_tokens": 50_000}


def run(small: bool) -> Found:
    stores = pocket(**({"rows": 20_000, "heldout": 6000} if small else {}), shuffle=False)
    train, held = map(columns, stores)
    cut = len(held["x"]) // 5
    tune, test = ({k: v[part] for k, v in held.items()} for part in (slice(cut), slice(cut, None)))
    steps = 20 if small else 300
    edges = np.quantile(train["complexity"], (0.01, 0.99))
    sae = AdaptiveK(256, N, **K, lowest=float(edges[0]), highest=float(edges[1]), **DEAD)
    more = {"steps": steps, "small": small, "batch": BATCH, "score": scored, "finish": finish}

    def compare(name, sae, train):
        sample = {k: v[::20] for k, v in train.items()}  # the probe is fitted to it
        how = {**SHORT_RUN, "sample": sample}
        return compared({name: sae}, lambda seed: (train, tune, test), how=how, **more)

    runs, grids = compare("adaptive_k", sae, train)
    k = round(np.mean(of(runs, "l0")))
    sides = {
        "random direction": (sae, unrelated(train, train)),
        "topk": (TopK(256, N, k=k, **DEAD), train),
        "batch_topk": (BatchTopK(256, N, k=k, **DEAD), train),
    }
    for name, (sae, rows) in sides.items():
        found, grid = compare(name, sae, rows)
        runs, grids = runs + found, grids + grid
    return Found(True, "a small run", "", runs) if small else judged(runs, grids)


def columns(store) -> dict[str, np.ndarray]:
    """x and complexity of the rows that have a whole window of text before them."""
    found = read(store, x=SITE, tokens="tokens", position="position")
    rows = np.flatnonzero(found["position"] >= WINDOW)
    text = found["tokens"].astype(np.uint8)
    size = [len(zlib.compress(text[i - WINDOW + 1 : i + 1].tobytes(), 6)) for i in rows]
    return {"x": found["x"][rows], "complexity": np.asarray(size, np.float32)}


def unrelated(columns: dict, like: dict) -> dict:
    """The complexity that a random direction says, with the distribution of the true one."""
    direction = np.random.default_rng(0).normal(size=columns["x"].shape[1])
    said = (columns["x"] @ direction).argsort().argsort()
    return {**columns, "complexity": np.sort(like["complexity"])[said]}


def scored(sae, params, rows) -> dict:
    """Scores, and the probe's correlation with complexity."""
    found = scores(sae, params, rows["x"])
    if isinstance(sae, AdaptiveK):
        said = rows["x"] * params["probe_scale"] @ params["probe_w"]
        found["correlation"] = float(np.corrcoef(said, rows["complexity"])[0, 1])
    return found


def finish(sae, params, train):
    if not isinstance(sae, BatchTopK):
        return params
    some = jnp.asarray(train["x"][::20])
    return {**params, "threshold": estimate_threshold(sae, params, some)}


def judged(runs: list, grids: list) -> Found:
    fvu = {n: of(runs, "fvu", method=n) for n in dict.fromkeys(r["method"] for r in runs)}
    wrong = [n for n in ("topk", "random direction") if not beyond(fvu["adaptive_k"], fvu[n])]
    ours = "FVU: " + ", ".join(
        f"{n} {told(v)} (L0 {np.mean(of(runs, 'l0', method=n)):.1f})" for n, v in fvu.items()
    )
    readable = np.mean(of(runs, "correlation", method="adaptive_k"))
    why = f"not below {' and '.join(wrong)}" if wrong else "Below both in every seed"
    why += f"; the probe's correlation with compressed size is {readable:.2f} on held-out rows"
    if beyond(fvu["batch_topk"], fvu["adaptive_k"]):
        why += "; BatchTopK, which needs no complexity, is below it in every seed"
    return Found(not wrong, ours, why + ".", runs, control, grids)


def control() -> tuple[bool, str]:
    """Sums of 1 or 15 features that share a direction: their number is linear in the row."""
    D = directions(64, 32) + 0.5 * directions(1, 32, 1)
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    counts = np.random.default_rng(0).choice([1, 15], 44_000)
    x = sums(D, len(counts), counts, 0)[0]
    rows = {"x": x, "complexity": counts.astype(np.float32)}
    parts = (slice(40_000), slice(40_000, 41_000), slice(41_000, None))
    data = [{name: column[part] for name, column in rows.items()} for part in parts]
    shape = {"k_min": 1, "k_max": 16, "steep": 5.0, "lowest": 0.0, "highest": 16.0, "l1": 0.0}
    sae, found = AdaptiveK(32, 64, **shape, **DEAD), {}
    sample = {name: column[::20] for name, column in data[0].items()}
    more = {"steps": 500, "how": {**SHORT_RUN, "sample": sample}, "score": scored}
    for name in ("AdaptiveK", "TopK"):
        runs, _ = compared({name: sae}, lambda seed: data, **more)
        found[name] = of(runs, "fvu")
        sae = TopK(32, 64, k=round(np.mean(of(runs, "l0"))), **DEAD)
    won = beyond(*found.values())
    told_of = ", ".join(f"{name} {told(v)}" for name, v in found.items())
    return won, f"1 or 15 known features, complexity their number: FVU {told_of}"


if __name__ == "__main__":
    main(STUDY, run)
