"""Feature Choice: latents choose their rows, by the law of their densities.

    saex train --config=experiments/methods/feature_choice.py --workdir=runs/feature_choice

To look at: dead latents on held-out rows, and how near k the L0 is there (by thresholds), against
Mutual Choice. Latents choose from 0.8 of the run on (``sae.choice_from``), which is where the
learning rate starts to fall (``optim.decay`` 0.2): move both, or what either does cannot be told.

The quickstart's model, text and rows: after one run ``--config.store=runs/feature_choice/store``
serves the others of this folder. ``--config=experiments/methods/feature_choice.py:mutual_choice``
trains the method to compare with. Hardware: 2 CPU cores. 50 s, without harvest.
Expected: FVU 0.066 at L0 30.7, no latent dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "feature_choice": {"k": 32, "density_rows": 200_000, "law_every": 25, "threshold_rate": 0.02},
    "mutual_choice": {"k": 32, "density_rows": 200_000, "law_every": 25, "threshold_rate": 0.05},
}


def get_config(arg: str = "feature_choice") -> ConfigDict:
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
