"""Multi-TopK: one dictionary for several k.

    saex train --config=experiments/methods/multi_topk.py --workdir=runs/multi_topk

To look at: "mse_wide" beside "mse" in metrics.jsonl, and what it costs in FVU at L0 32 against
TopK's.

The quickstart's model, text and rows: after one run ``--config.store=runs/multi_topk/store`` serves
the others of this folder. ``--config=experiments/methods/multi_topk.py:topk`` trains the method to
compare with. Hardware: 2 CPU cores. 77 s, without harvest.
Expected: FVU 0.061 at L0 32.0, no latent dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "multi_topk": {"k": 32},
    "topk": {"k": 32},
}


def get_config(arg: str = "multi_topk") -> ConfigDict:
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
