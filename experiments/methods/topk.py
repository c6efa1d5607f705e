"""TopK: a fixed number of active latents a row, dead ones revived by AuxK.

    saex train --config=experiments/methods/topk.py --workdir=runs/topk

To look at: FVU at L0 32, dead latents, and the report.

The quickstart's model, text and rows, with fewer steps of fewer rows: after one run
``--config.store=runs/topk/store`` serves the others of this folder.
``--config=experiments/methods/topk.py:relu`` trains the method to compare with. Hardware: 2 CPU
cores. 68 s, with harvest.
Expected: FVU 0.060 at L0 32.0, 0.3% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "topk": {"k": 32},
    "relu": {"l1": 0.02, "l1_warmup_steps": 25},
}


def get_config(arg: str = "topk") -> ConfigDict:
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
