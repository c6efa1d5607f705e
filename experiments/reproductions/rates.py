"""The learning rate of each method of a study, found in the same way for all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from study import scores, shuffled, trained

RATES, SEEDS = (1e-3, 3e-3, 1e-2), (1, 2, 3)  # seed 0 is for finding rates
SHORT_RUN = {"clip": 0.01}  # below every gradient's norm, which helps runs of some 100 steps
TUNED = (
    "with gradients clipped and the best of three learning rates, or four where that is on the "
    "edge, by the {} of one more seed on other rows"
)
Rows = Callable[[int], tuple[Any, Any, Any]]


def best_rate(
    name: str, score: Callable[[float], float], rates: Sequence[float] = RATES, more: int = 1
) -> dict[str, Any]:
    """The rate with the least score: {"of": name, "lr", "edge", "tried": its scores}.

    ``score``: of one run, on rows apart from those of the verdict; a run that is not finite has an
    infinite one. A winner on the grid's edge has the next rate beyond it tried as well, at most
    ``more`` times. edge: whether the winner is on the edge all the same.
    """
    tried = {lr: finite(score, lr) for lr in sorted(rates)}
    for _ in range(more):
        lr, grid = min(tried, key=tried.__getitem__), sorted(tried)
        if lr not in (grid[0], grid[-1]):
            break
        beyond = lr * lr / (grid[1] if lr == grid[0] else grid[-2])
        beyond = float(f"{beyond:.2g}")
        tried[beyond] = finite(score, beyond)
    lr, edge = min(tried, key=tried.__getitem__), (min(tried), max(tried))
    said = {lr: score if math.isfinite(score) else None for lr, score in tried.items()}
    return {"of": name, "lr": lr, "edge": lr in edge, "tried": said}


def finite(score: Callable[[float], float], lr: float) -> float:
    try:
        found = score(lr)
    except (RuntimeError, ValueError):  # ``trained``: not finite; ``at_l0``: not within reach
        return math.inf
    return found if math.isfinite(found) else math.inf


def compared(
    sides: Mapping[str, Any],
    rows: Rows,
    *,
    steps: int,
    small: bool = False,
    by: str = "fvu",
    batch: int = 512,
    seeds: Sequence[int] = SEEDS,
    rates: Sequence[float] = RATES,
    score: Callable[[Any, Any, Any], dict[str, Any]] = scores,
    finish: Callable[[Any, Any, Any], Any] = lambda sae, params, train: params,
    how: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(runs of every seed at each method's best rate, how each rate was found).

    ``rows``: seed -> rows for training (or columns by name), for finding a rate, and for the
    verdict. ``score``: of (dictionary, params, rows); ``by``: which of its figures finds the rate.
    ``finish``: what is done to the params after training. ``how``: for ``trained`` (clip, betas),
    the same for all. ``settings`` are noted in the runs.
    """

    def one(name: str, lr: float, seed: int, at: int) -> dict[str, Any]:
        sae, data = sides[name], rows(seed)
        columns = data[0] if isinstance(data[0], Mapping) else {"x": data[0]}
        batches = shuffled({column: columns[column] for column in sae.columns}, batch, seed)
        params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed, **(how or {}))
        found = score(sae, finish(sae, params, data[0]), data[at])
        return {"method": name, **settings, "lr": lr, "seed": seed, **found}

    runs, grids = [], []
    for name in sides:
        few = {"rates": rates[:2], "more": 0} if small else {"rates": rates}
        grids.append(best_rate(name, lambda lr, name=name: one(name, lr, 0, 1)[by], **few))
        grids[-1] |= settings
        runs += [one(name, grids[-1]["lr"], s, 2) for s in (seeds[:1] if small else seeds)]
    return runs, grids


def around(
    run_at: Callable[[float], dict[str, Any]], penalty: float, l0: float
) -> list[dict[str, Any]]:
    """Two runs, by their penalties a factor of three apart, with L0 on both sides of this one."""
    runs = [run_at(penalty)]
    factor = 3.0 if runs[0]["l0"] > l0 else 1 / 3
    while len({run["l0"] > l0 for run in runs}) == 1 and len(runs) < 8:
        runs.append(run_at(runs[-1]["penalty"] * factor))
    return runs[-2:]


def penalty_at(runs: Sequence[Mapping[str, Any]], l0: float) -> float:
    """The penalty for an L0, by the line through two runs in logarithms."""
    (x0, y0), (x1, y1) = ((math.log(run["penalty"]), math.log(run["l0"])) for run in runs)
    return float(f"{math.exp(x0 + (math.log(l0) - y0) * (x1 - x0) / (y1 - y0)):.3g}")
