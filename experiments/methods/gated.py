"""Gated SAE: which latents are on is learned apart from how large they are.

    saex train --config=experiments/methods/gated.py --workdir=runs/gated

To look at: FVU at the L0 that comes out, against ReLU's at the same L0 (sweep ``sae.l1`` of both):
L1 shrinks the ReLU's magnitudes, and the gates' alone here.

The quickstart's model, text and rows: after one run ``--config.store=runs/gated/store`` serves the
others of this folder. ``--config=experiments/methods/gated.py:relu`` trains the method to compare
with. Hardware: 2 CPU cores. 47 s, without harvest.
Expected: FVU 0.061 at L0 35.6, 1.8% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "gated": {"name": "gated", "l1": 0.08, "l1_warmup_steps": 25},
    "relu": {"name": "relu", "l1": 0.05, "l1_warmup_steps": 25},
}


def get_config(arg: str = "gated") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
