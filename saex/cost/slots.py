"""How many latents of a row a training step works on: k, candidates, or all of them.

What ``encode`` returns does not tell: methods with dense codes train on candidates where they pay
(``saex.sae.selection``), and touch what they keep of them. Their rules are repeated here, as this
package lies below theirs; ``tests/test_cost.py`` compares them with what methods ask for.
"""

import dataclasses
from typing import Any

USUAL, PAY_FROM = 256, 32  # of methods without k: candidates, and latents to each of them
TIMES_K, PAY_FROM_K, PAY_FROM_LEVELS = 8, 12, 8  # with k; where prefixes are drawn or split


@dataclasses.dataclass(frozen=True)
class Slots:
    """Of one row, on one device.

    Fields:
      chosen: latents that selection hands on; 0: none, the codes are dense.
      used: how many of them are not 0, in the mean: what has to be gathered.
      parts: reconstructions that are made of them (nested prefixes).
      batch: whether a cut over the whole batch is taken through the chosen ones.
    """

    chosen: int
    used: float | int
    parts: int = 1
    batch: bool = False


def slots(sae: Any, model: int = 1, active: float | int | None = None) -> Slots:
    """The slots of a method on one of ``model`` shards of latents.

    Args:
      sae: a dictionary.
      active: latents a row that are not 0, in the mean, where the method does not say it: by
        default its k or its ``l0_target``, else an eighth of its candidates.
    """
    n, parts = sae.n // model, len(sae.prefixes) if hasattr(sae, "prefixes") else 1
    parts = getattr(sae, "sampled", 0) or parts
    k = getattr(sae, "k", None)
    chosen = min(sae.k, n) if is_sparse(sae) else candidates(sae, model)
    known = k or getattr(sae, "l0_target", None) or chosen * model / 8
    used = (known if active is None else active) / model
    return Slots(chosen, min(used, chosen), parts, bool(k) and not is_sparse(sae))


def is_sparse(sae: Any) -> bool:
    """Whether a dictionary's codes are k slots a row rather than n entries."""
    return "indices" in getattr(sae.codes, "__dataclass_fields__", {})


def candidates(sae: Any, model: int = 1) -> int:
    """Candidates that a method with dense codes takes of each row on a device; 0: none."""
    n, k = sae.n // model, getattr(sae, "k", None)
    if not hasattr(sae, "capacity"):
        return 0
    if sae.capacity is not None:
        return min(sae.capacity, n)
    usual, pay_from = (TIMES_K * k, PAY_FROM_K) if k else (USUAL, PAY_FROM)
    if hasattr(sae, "prefixes") and (sae.sampled or model > 1):
        pay_from = PAY_FROM_LEVELS
    return usual if pay_from * usual <= n else 0


def examples(sae: Any) -> int:
    """Rows that are encoded for each row of a batch: its sites, where each is taken alone."""
    return getattr(sae, "sites", 1) if hasattr(sae, "d_batch") else 1
