"""JumpReLU: a threshold for each latent, trained through straight-through estimators.

    saex train --config=experiments/methods/jump_relu.py --workdir=runs/jump_relu

To look at: "l0" falling in metrics.jsonl as thresholds rise, "relative_bias" near 1 in eval.json,
and FVU against TopK's at the same L0.

The quickstart's model, text and rows: after one run ``--config.store=runs/jump_relu/store``
serves the others of this folder. ``--config=experiments/methods/jump_relu.py:topk`` trains
the method to compare with. Hardware: 2 CPU cores. 49 s, without harvest.
Expected: FVU 0.059 at L0 33.8, 13% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "jump_relu": {
        "l0": 4e-4,
        "l0_warmup_steps": 100,
        "bandwidth": 0.03,
        "threshold": 0.03,
    },
    "topk": {"k": 32},
}


def get_config(arg: str = "jump_relu") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
