"""Group bias adaptation: biases steered to how often latents shall fire, and no sparsity loss.

    saex train --config=experiments/methods/group_bias.py --workdir=runs/group_bias

To look at: "over_target" (the share of latents that fire more often than meant) falling, L0, and
the report's densities, which should lie below a ladder from 10% down.

The quickstart's model, text and rows: after one run ``--config.store=runs/group_bias/store``
serves the others of this folder. ``:one`` is one group with one target (BA). Hardware: 2 CPU
cores. 40 s, without harvest.
Expected: FVU 0.214 at L0 34.0, 0.8% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "group_bias": {"name": "group_bias", "most": 0.1, "every": 5, "rate_down": 0.05},
    "one": {"name": "group_bias", "groups": 1, "most": 0.02, "every": 5, "rate_down": 0.05},
}


def get_config(arg: str = "group_bias") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
