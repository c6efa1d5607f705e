"""MP-SAE against TopK and BatchTopK on the tree of its paper.

    python experiments/reproductions/pursuit.py

Rows and scores: those of ``hierarchy.py``.
"""

from hierarchy import BASELINES, COMMON, TUNED, compared, control, draw, not_below, ours
from study import Found, Study, compile_once, main, of

from saex.sae import MatchingPursuit

STUDY = Study(
    name="pursuit",
    methods=("matching_pursuit", "batch_topk", "topk"),
    claim="On a tree of features MP-SAE finds parents and children, where TopK and BatchTopK "
    "absorb the parent into its children's latents.",
    source="arXiv 2506.03093",
    paper="exact recovery of such a tree, no absorption",
    own_text=True,
    baseline="TopK and BatchTopK with k 2, n 20; MP-SAE with 10 steps, which go on "
    f"until little is left of a row (a tolerance of 0.1 at inference); {TUNED}",
    says_no_if="a seed of MP-SAE has a parent's latent silent beside an active child as often as "
    "any seed of the baselines, or its children's latents as close to the parent, or finds fewer "
    "than 95% of the nodes at cosine 0.95, or has above 2.5 latents a row where 2 nodes are active",
)
PURSUIT = MatchingPursuit(k=10, tolerance=0.1, **COMMON)


def run(small: bool) -> Found:
    compile_once()
    saes = {**BASELINES, "matching_pursuit": PURSUIT}
    steps = 60 if small else 2500
    runs, grids, pictures = compared(saes, steps, small)
    if not small:
        draw(STUDY.name, {n: pictures[n] for n in ("topk", "batch_topk", "matching_pursuit")})
    wrong = not_below(runs, "matching_pursuit")
    if min(of(runs, "found", method="matching_pursuit")) < 0.95:
        wrong.append("a seed finds fewer than 95% of the nodes")
    if max(of(runs, "l0", method="matching_pursuit")) > 2.5:
        wrong.append("a seed has above 2.5 latents a row")
    why = "; ".join(wrong) or "All as said in every seed."
    return Found(not wrong, ours(runs), why, runs, lambda: control(saes, "matching_pursuit"), grids)


if __name__ == "__main__":
    main(STUDY, run)
