"""Transcoder: an MLP's output from its input, by latents that its weights can be read through.

    saex train --config=experiments/methods/transcoder.py --workdir=runs/transcoder

To look at: FVU of mlp_out at the L0 that comes out, against the skip transcoder's, and the report's
latents, which say when the MLP writes what.

Harvests the MLP's input and output into a store of its own (rows as the quickstart's); afterwards
``--config.store=runs/transcoder/store`` serves experiments/methods/skip_transcoder.py as well.
Hardware: 2 CPU cores. 81 s, with harvest.
Expected: FVU 0.071 at L0 116.9, no latent dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "transcoder": {"l1": 0.01, "l1_warmup_steps": 25},
}


def get_config(arg: str = "transcoder") -> ConfigDict:
    sae = {"d_in": 256, "d_out": 256, "n": 2048, "dead_after_tokens": 100_000}
    return ConfigDict(
        {
            "sae": {"name": arg, **sae, **SAES[arg]},
            "site": "blocks.1.mlp_in",
            "columns": {"y": "blocks.1.mlp_out"},
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
