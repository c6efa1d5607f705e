"""Crosscoder: one code for the residual stream after three blocks.

    saex train --config=experiments/methods/crosscoder.py --workdir=runs/crosscoder

To look at: "fvu_0", "fvu_1", "fvu_2" of metrics.jsonl (the sites), and where latents live:
``saex.sae.sites.relative_norms(params, sae.widths)`` of the checkpoint.

Harvests three sites into a store of its own (rows as the quickstart's); ``--config.store=`` that
store serves experiments/methods/batch_crosscoder.py and multi_layer.py as well. Hardware: 2 CPU
cores. 125 s, with harvest.
Expected: FVU 0.072 at L0 91.6, 16% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "crosscoder": {"l1": 0.02, "l1_warmup_steps": 25},
}


def get_config(arg: str = "crosscoder") -> ConfigDict:
    sae = {"d_in": 768, "n": 2048, "widths": (256,) * 3, "dead_after_tokens": 100_000}
    return ConfigDict(
        {
            "sae": {"name": arg, **sae, **SAES[arg]},
            "site": "+".join(f"blocks.{i}.resid_post" for i in range(3)),
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
