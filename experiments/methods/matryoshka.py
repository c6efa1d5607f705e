"""Matryoshka SAE: prefixes of the dictionary that each reconstruct alone.

    saex train --config=experiments/methods/matryoshka.py --workdir=runs/matryoshka

To look at: "fvu_1" to "fvu_4" (the prefixes') in metrics.jsonl, FVU a little above BatchTopK's,
and in the report that low latents are the general ones.

The quickstart's model, text and rows: after one run ``--config.store=runs/matryoshka/store``
serves the others of this folder. ``:sampled`` draws ten prefixes in each step; ``:batch_topk``
trains the method to compare with. Hardware: 2 CPU cores. 46 s, without harvest.
Expected: FVU 0.076 at L0 31.7, 9.4% of the latents dead on held-out rows; with ``threshold_rate``
0.01, whose mean lags behind a run of 300 steps, L0 is lower.
"""

from ml_collections import ConfigDict

SAES = {
    "matryoshka": {"name": "matryoshka", "k": 32, "threshold_rate": 0.05},
    "sampled": {"name": "matryoshka", "k": 32, "threshold_rate": 0.05, "sampled": 10},
    "batch_topk": {"name": "batch_topk", "k": 32, "threshold_rate": 0.05},
}


def get_config(arg: str = "matryoshka") -> ConfigDict:
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
