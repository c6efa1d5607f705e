"""KronSAE: an encoder of 256 heads with two and four units, for 2048 latents.

    saex train --config=experiments/methods/kron.py --workdir=runs/kron

To look at: FVU at L0 32 against TopK's, with 3/4 of its encoder; ``:wide`` has units of 4 and 8
and 3/8 of it.

The quickstart's model, text and rows: after one run ``--config.store=runs/kron/store`` serves the
others of this folder. ``:topk`` trains the method to compare with. Hardware: 2 CPU cores. 77 s,
without harvest.
Expected: FVU 0.067 at L0 32.0, 3.7% of the latents dead on held-out rows. With batches of 1024
rows 0.073; without ``optim.clip`` 0.080 then.
"""

from ml_collections import ConfigDict

SAES = {
    "kron": {"name": "kron", "k": 32},
    "wide": {"name": "kron", "k": 32, "base": 4, "extension": 8},
    "topk": {"name": "topk", "k": 32},
}


def get_config(arg: str = "kron") -> ConfigDict:
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
