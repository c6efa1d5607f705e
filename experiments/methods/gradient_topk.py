"""g-SAE: TopK that prefers latents with an effect on the language model's loss.

    saex train --config=experiments/methods/gradient_topk.py --workdir=runs/gradient_topk

To look at: cross-entropy with the reconstruction in place at L0 32, against TopK's on the same
store; its FVU should be a little worse. The evaluation encodes without gradients (plain TopK).

Harvests the site and the gradient of the model's loss there into a store of its own (rows as the
quickstart's; a pass with gradients takes about three times as long).
``--config=experiments/methods/gradient_topk.py:topk --config.store=runs/gradient_topk/store``
trains the method to compare with. Hardware: 2 CPU cores. 136 s, with harvest.
Expected: FVU 0.058 at L0 32.0, 0.1% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "gradient_topk": {"k": 32},
    "topk": {"k": 32},
}
SITE = "blocks.1.resid_post"


def get_config(arg: str = "gradient_topk") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": SITE,
            "columns": {"gradient": f"{SITE}.gradient"} if arg == "gradient_topk" else {},
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
