"""Settings moved until L0 lies close to a target on both sides, and scores read in between."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Of the L0 on both sides, or of the nearer and the target: there a line in logarithms is enough.
CLOSE, VERY_CLOSE = 1.35, 1.03
Run = Mapping[str, Any]


def search(
    run: Callable[[float], Run], starts: Sequence[float], target: float, name: str, most: int
) -> list[Run]:
    """Runs at ``starts`` and at up to ``most`` values in all, chosen by the L0 that came out.

    Args:
      run: value of the setting -> scores with "l0" (None: diverged, which ends the search).
      name: of the setting; L0 rises with "k" and "target_l0" and falls with the others.
    """
    runs: list[Run] = []
    values = list(starts)
    while len(runs) < most and not enclosed(runs, target):
        value = values.pop(0) if values else propose(runs, target, name)
        if value is None:
            break
        runs.append({"value": value, **run(value)})
        if runs[-1]["l0"] is None:
            break
    return runs


def propose(runs: Sequence[Run], target: float, name: str) -> float | None:
    """The value to try next; None where it was tried before."""
    above, below = around(runs, target)
    sign = 1 if name in ("k", "target_l0") else -1
    if above and below:
        value = _between(above, below, target)
    else:  # beyond the nearest, by a little more than is missing
        nearest = above or below
        assert nearest is not None
        missing = target / max(nearest["l0"], 1e-2)
        factor = missing * (1.1 if missing > 1 else 1 / 1.1)
        factor = min(max(factor if sign > 0 else factor**-1.5, 1 / 8), 8)
        value = nearest["value"] * factor
    if name == "k":
        value = float(max(round(value), 1))
    return None if any(r["value"] == value for r in runs) else value


def _between(above: Run, below: Run, target: float) -> float:
    """By a line in logarithms, aimed a little past the target from a side that is close to it."""
    if above["l0"] < 1.1 * target:
        target /= 1.08
    elif below["l0"] > target / 1.1:
        target *= 1.08
    low, high = math.log(max(below["l0"], 1e-2)), math.log(above["l0"])
    share = (math.log(target) - low) / (high - low)
    return below["value"] ** (1 - share) * above["value"] ** share


def around(runs: Sequence[Run], target: float) -> tuple[Run | None, Run | None]:
    """(the run with the least L0 that is at least the target, that with the most below it)."""
    fine = [r for r in runs if r["l0"] is not None]
    above = min((r for r in fine if r["l0"] >= target), key=lambda r: r["l0"], default=None)
    return above, max((r for r in fine if r["l0"] < target), key=lambda r: r["l0"], default=None)


def enclosed(runs: Sequence[Run], target: float) -> bool:
    """Whether runs lie on both sides of the target, close to each other or one very close to it."""
    above, below = around(runs, target)
    if not (above and below):
        return False
    near = min(above["l0"] / target, target / max(below["l0"], 1e-2))
    return near <= VERY_CLOSE or above["l0"] <= CLOSE * below["l0"]


def read(runs: Sequence[Run], score: str, target: float) -> float | None:
    """A score at an L0, between the nearest runs; None where they are not on both sides.

    Linear in the logarithm of L0; of FVU the logarithm too.
    """
    above, below = around(runs, target)
    if not (above and below and below["l0"] > 0):
        return None
    share = math.log(target / below["l0"]) / math.log(above["l0"] / below["l0"])
    if score.endswith("fvu"):
        return below[score] ** (1 - share) * above[score] ** share
    return (1 - share) * below[score] + share * above[score]
