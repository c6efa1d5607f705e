"""Multi-layer SAE: one TopK dictionary for the residual stream after every block.

    saex train --config=experiments/methods/multi_layer.py --workdir=runs/multi_layer

To look at: FVU of each site (``saex eval`` prints them) against a TopK of one site, and at which
sites a latent fires: ``sae.encode(params, rows of one site)``.

Harvests three sites into a store of its own (rows as the quickstart's; a batch of 688 rows has
2064 examples); ``--config.store=`` that store serves experiments/methods/crosscoder.py and
batch_crosscoder.py as well. Hardware: 2 CPU cores. 61 s, without harvest.
Expected: FVU 0.084 at L0 32.0, 1.0% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "multi_layer": {"k": 32, "sites": 3},
}


def get_config(arg: str = "multi_layer") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "+".join(f"blocks.{i}.resid_post" for i in range(3)),
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 688},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
