"""Top-AFA: as many latents as make up a row's norm; no k is chosen.

    saex train --config=experiments/methods/top_afa.py --workdir=runs/top_afa

To look at: the L0 that comes out, "eps_lbo" in metrics.jsonl, and the FVU against TopK at that L0
(--config.sae.k).

The quickstart's model, text and rows: after one run ``--config.store=runs/top_afa/store`` serves
the others of this folder. ``--config=experiments/methods/top_afa.py:topk`` trains the method to
compare with. Hardware: 2 CPU cores. 78 s, without harvest.
Expected: FVU 0.101 at L0 171.0, 1.2% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "top_afa": {"afa": 1 / 64},
    "topk": {"k": 256},
}


def get_config(arg: str = "top_afa") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 2e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
