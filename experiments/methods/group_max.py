"""GroupMax: of each of k groups of latents the largest.

    saex train --config=experiments/methods/group_max.py --workdir=runs/group_max

To look at: what groups cost in FVU at L0 32 against TopK's, and what a step takes without the
top-k.

The quickstart's model, text and rows: after one run ``--config.store=runs/group_max/store`` serves
the others of this folder. ``--config=experiments/methods/group_max.py:topk`` trains the method to
compare with. Hardware: 2 CPU cores. 32 s, without harvest.
Expected: FVU 0.067 at L0 31.7, 0.05% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "group_max": {"k": 32},
    "topk": {"k": 32},
}


def get_config(arg: str = "group_max") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
