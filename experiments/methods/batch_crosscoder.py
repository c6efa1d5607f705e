"""BatchTopK crosscoder: one code for three sites, no penalty that shrinks a latent at one of them.

    saex train --config=experiments/methods/batch_crosscoder.py --workdir=runs/batch_crosscoder

To look at: FVU at L0 32 against the ReLU crosscoder's at its L0, and how many latents live at one
site alone (``saex.sae.sites.relative_norms(params, sae.widths)``) in both.

Harvests three sites into a store of its own (rows as the quickstart's); ``--config.store=`` that
store serves experiments/methods/crosscoder.py and multi_layer.py as well. Hardware: 2 CPU cores.
90 s, without harvest.
Expected: FVU 0.099 at L0 32.7, 40% of the latents dead on held-out rows. With batches of 1024 rows
0.111, half dead; without ``optim.clip`` 0.123 then.
"""

from ml_collections import ConfigDict

SAES = {
    "batch_crosscoder": {"k": 32, "threshold_rate": 0.05},
}


def get_config(arg: str = "batch_crosscoder") -> ConfigDict:
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
