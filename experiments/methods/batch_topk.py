"""BatchTopK: as many latents a row as it takes, k on average.

    saex train --config=experiments/methods/batch_topk.py --workdir=runs/batch_topk

To look at: L0 at inference against k (the threshold's), FVU against TopK's at the same L0, and
"fallbacks" in metrics.jsonl, the steps so far that were done densely.

The quickstart's model, text and rows: after one run ``--config.store=runs/batch_topk/store``
serves the others of this folder. ``--config=experiments/methods/batch_topk.py:topk`` trains
the method to compare with. Hardware: 2 CPU cores. 38 s, without harvest.
Expected: FVU 0.063 at L0 31.1, 0.2% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "batch_topk": {"k": 32, "threshold_rate": 0.02},
    "topk": {"k": 32},
}


def get_config(arg: str = "batch_topk") -> ConfigDict:
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
