"""ReLU with an L1 of latents times decoder norms: the baseline of the field.

    saex train --config=experiments/methods/relu.py --workdir=runs/relu

To look at: "relative_bias" in eval.json, below 1: the L1 shrinks, TopK does not; FVU at its L0.

The quickstart's model, text and rows: after one run ``--config.store=runs/relu/store``
serves the others of this folder. ``--config=experiments/methods/relu.py:topk`` trains
the method to compare with. Hardware: 2 CPU cores. 42 s, without harvest.
Expected: FVU 0.074 at L0 32.8, 2.0% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "relu": {"l1": 0.05, "l1_warmup_steps": 25},
    "topk": {"k": 32},
}


def get_config(arg: str = "relu") -> ConfigDict:
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
