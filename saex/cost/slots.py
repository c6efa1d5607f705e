"""How many latents of a row a training step works on: k, as many as it has room for, or all.

What ``encode`` returns does not tell: methods with dense codes train on what they find where that
pays (``encode_above.room_for``), and touch what they keep of it; ``tests/test_cost.py`` compares
this with what methods ask for.
"""

import dataclasses
from typing import Any

from saex.kernels.encode_above import room_for


@dataclasses.dataclass(frozen=True)
class Slots:
    """Of one row, on one device.

    Fields:
      chosen: latents that selection has room for; 0: none, the codes are dense.
      used: how many of them are not 0, in the mean: what has to be gathered.
      parts: reconstructions that are made of them (nested prefixes).
      batch: whether a cut over the whole batch is taken through the chosen ones.
      top: whether they are the largest of each row.
    """

    chosen: int
    used: float | int
    parts: int = 1
    batch: bool = False
    top: bool = True


def slots(sae: Any, model: int = 1, active: float | int | None = None) -> Slots:
    """The slots of a method on one of ``model`` shards of latents.

    Args:
      sae: a dictionary.
      active: latents a row that are not 0, in the mean, where the method does not say it: by
        default its k or its ``l0_target``, else an eighth of what has room.
    """
    n, parts = sae.n // model, len(sae.prefixes) if hasattr(sae, "prefixes") else 1
    parts = getattr(sae, "sampled", 0) or parts
    k = getattr(sae, "k", None)
    sparse = is_sparse(sae)
    chosen = min(sae.k, n) if sparse else room(sae, model)
    known = k or getattr(sae, "l0_target", None) or chosen * model / 8
    used = (known if active is None else active) / model
    return Slots(chosen, min(used, chosen), parts, bool(k) and not sparse, sparse)


def is_sparse(sae: Any) -> bool:
    """Whether a dictionary's codes are k slots a row rather than n entries."""
    return "indices" in getattr(sae.codes, "__dataclass_fields__", {})


def room(sae: Any, model: int = 1) -> int:
    """Latents of a row, in the mean, that a method with dense codes has room for on a device; 0: it
    is done densely.
    """
    if not hasattr(sae, "capacity"):
        return 0
    return room_for(sae.capacity, sae.n // model, getattr(sae, "k", None))


def examples(sae: Any) -> int:
    """Rows that are encoded for each row of a batch: its sites, where each is taken alone."""
    return getattr(sae, "sites", 1) if hasattr(sae, "d_batch") else 1
