"""Mutual Choice: BatchTopK's selection with aux_zipf, which serves underused latents.

    saex train --config=experiments/methods/mutual_choice.py --workdir=runs/mutual_choice

To look at: "underused" in metrics.jsonl and the densities in the report, against BatchTopK's:
whether fewer latents are left in the low tail, at which FVU.

The quickstart's model, text and rows: after one run ``--config.store=runs/mutual_choice/store``
serves the others of this folder. ``--config=experiments/methods/mutual_choice.py:batch_topk``
trains the method to compare with. Hardware: 2 CPU cores. 44 s, without harvest.
Expected: FVU 0.062 at L0 32.0, no latent dead on held-out rows; with ``threshold_rate`` 0.01, whose
mean lags behind a run of 300 steps, L0 is lower.
"""

from ml_collections import ConfigDict

SAES = {
    "mutual_choice": {"k": 32, "density_rows": 200_000, "law_every": 25, "threshold_rate": 0.05},
    "batch_topk": {"k": 32, "threshold_rate": 0.05},
}


def get_config(arg: str = "mutual_choice") -> ConfigDict:
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
