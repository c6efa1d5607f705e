r"""Crosscoder of two models: one code for what pocket-lm and an early checkpoint of it hold.

    saex pretrain --config=experiments/pocket_lm.py --config.steps=120 --workdir=runs/early && \
    saex train --config=experiments/methods/crosscoder_models.py --workdir=runs/crosscoder_models

To look at: which latents live in one model alone, ``saex.sae.sites.relative_norms(params,
sae.widths)`` of the checkpoint: 0 is the early model's, 1 pocket-lm's, between them are shared
ones. ``:crosscoder`` trains the form with an L1, whose exclusive latents are partly made by it.

The first half is the second model (five minutes on 2 CPU cores; any workdir of `saex pretrain`
does, also a step-N.safetensors in it). The second harvests both models' sites over the same tokens
into a store of its own. 231 s, with harvest.
Expected: FVU 0.087 at L0 32.1, 48% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "batch_crosscoder": {"k": 32, "threshold_rate": 0.05},
    "crosscoder": {"l1": 0.02, "l1_warmup_steps": 25},
}
SITE = "blocks.1.resid_post"


def get_config(arg: str = "batch_crosscoder") -> ConfigDict:
    sae = {"d_in": 512, "n": 2048, "widths": (256, 256), "dead_after_tokens": 100_000}
    return ConfigDict(
        {
            "sae": {"name": arg, **sae, **SAES[arg]},
            "subject": {
                "name": "several",
                "paths": {"early": "runs/early", "late": "pocket-lm"},
            },
            "site": f"early.{SITE}+late.{SITE}",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
