"""Layer groups: one TopK dictionary for the layers whose activations point the same way.

    saex train --config=experiments/methods/layer_groups.py --workdir=runs/layer_groups

To look at: FVU of each site (``saex eval`` prints them) against a TopK of that site alone with half
of the latents, and what was saved: one dictionary trained for two layers.

The groups are pocket-lm's: the angular distance of its residual stream is 0.22 between the second
block and the third, and 0.28 and 0.35 from the first to these (1 is the opposite direction;
experiments/reproductions/layer_groups.py). For another model ``angular_distances`` and
``fewest_groups`` of ``saex.evals.layer_groups`` say them, from a store of all sites;
``--config=experiments/methods/layer_groups.py:first`` trains the other group here.

Harvests the sites of the group into a store of its own (rows as the quickstart's; a batch of 1024
rows has 2048 examples); ``--config.store=`` that of experiments/methods/multi_layer.py, which has
all three, serves as well. Hardware: 2 CPU cores. 49 s, without harvest.
Expected: FVU 0.096 at L0 32.0, 0.05% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

GROUPS = {"first": (0,), "others": (1, 2)}
SAES = {name: {"k": 32, "sites": len(group)} for name, group in GROUPS.items()}


def get_config(arg: str = "others") -> ConfigDict:
    group = GROUPS[arg]
    sae = {"name": "multi_layer", "d_in": 256, "n": 2048, "dead_after_tokens": 100_000}
    return ConfigDict(
        {
            "sae": {**sae, **SAES[arg]},
            "site": "+".join(f"blocks.{i}.resid_post" for i in group),
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048 // len(group)},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
