"""JumpReLU with tanh sparsity and a pre-activation loss, against the count of active latents.

    python experiments/reproductions/jump_relu_tanh.py

Rows: pocket-lm's residual stream after its second block.
"""

import itertools

from rates import TUNED
from study import Found, Study, beyond, main, of, pocket_rows, told
from sweep import LR, SEEDS, best_rate_at, control, fitted, read_at

STUDY = Study(
    name="jump_relu_tanh",
    methods=("jump_relu_tanh", "jump_relu"),
    claim="With few rows the tanh form reconstructs no worse than the straight-through count at "
    "equal L0, and its pre-activation loss leaves fewer latents dead than training without it.",
    source="Circuits Updates, January 2025 (Conerly et al.)",
    paper="no figure: the update describes a set-up and says that it was not ablated in detail",
    own_text=False,
    baseline="JumpReLU of the same width with the L0 loss; both with four penalties, read at L0 "
    f"16 and 32, {TUNED.format('FVU at L0 24')}; for dead latents "
    "the tanh form at its largest penalty without the pre-activation loss. Its weight is 3e-3, not "
    "the source's 3e-6 (run too), which only moves a latent when Adam has forgotten the gradients "
    "it had while it fired, after some thousand steps",
    says_no_if="at L0 16 or 32 all seeds of the count are below all of the tanh form in FVU, or "
    "a seed with the pre-activation loss has not fewer dead latents than all seeds without it",
)
N, L0S = 512, (16, 32)
SWEEPS = {
    "jump_relu_tanh": [{"sparsity": s, "pre_activation": 3e-3} for s in (0.05, 0.3, 1.5, 6.0)],
    "jump_relu": [{"l0": l0} for l0 in (3e-4, 1e-3, 2e-3, 4e-3)],
}
WEIGHTS = (0.0, 3e-6)
KNOWN = {"jump_relu_tanh": {"sparsity": 0.4, "pre_activation": 3e-3}, "jump_relu": {"l0": 0.05}}


def run(small: bool) -> Found:
    train, tune, test = pocket_rows(small)
    steps, seeds = (30, SEEDS[:1]) if small else (400, SEEDS)
    runs, grids = [], []
    for name, sweep in SWEEPS.items():
        ends = [sweep[0], sweep[-1]]
        if not small:
            grids.append(best_rate_at(name, ends, 24, train, tune, N, steps=steps))
        lr = LR if small else grids[-1]["lr"]
        if name == "jump_relu_tanh":
            sweep = sweep + [{**sweep[-1], "pre_activation": w} for w in WEIGHTS]
        for setting, seed in itertools.product(sweep[:1] if small else sweep, seeds):
            runs.append(fitted(name, setting, train, test, N, steps=steps, lr=lr, seed=seed))
    return Found(True, "a small run", "", runs) if small else judged(runs, grids)


def judged(runs: list, grids: list) -> Found:
    wrong, parts = [], []
    for l0 in L0S:
        fvu = {name: at(runs, name, l0) for name in SWEEPS}
        parts.append(f"FVU at L0 {l0}: " + ", ".join(f"{k} {told(v)}" for k, v in fvu.items()))
        if beyond(fvu["jump_relu"], fvu["jump_relu_tanh"]):
            wrong.append(f"the count is below the tanh form at L0 {l0} in every seed")
    top = SWEEPS["jump_relu_tanh"][-1]["sparsity"]
    dead = {w: of(runs, "dead", penalty=top, pre_activation=w) for w in (3e-3, *WEIGHTS)}
    if not beyond(dead[3e-3], dead[0.0]):
        wrong.append("the pre-activation loss does not leave fewer dead latents in every seed")
    told_of = ", ".join(f"{told(v, '.3f')} with weight {w:g}" for w, v in dead.items())
    parts.append(f"dead at the largest penalty: {told_of}")
    why = "; ".join(wrong) or "In every seed."
    return Found(not wrong, "; ".join(parts), why, runs, lambda: control(KNOWN), grids)


def at(runs: list, name: str, l0: float) -> list[float]:
    """FVU of each seed at an L0."""
    mine = [r for r in runs if r["method"] == name and r.get("pre_activation") not in WEIGHTS]
    return [read_at([r for r in mine if r["seed"] == s], "fvu", l0) for s in SEEDS]


if __name__ == "__main__":
    main(STUDY, run)
