"""Variational TopK: latents with noise in training and a divergence from N(0, 1).

    saex train --config=experiments/methods/variational.py --workdir=runs/variational

To look at: FVU and dead latents against TopK's: the paper finds both worse, the more so with a
larger ``sae.kl_coefficient``. With 2048 latents the noise alone does much of that: at its start of
0.05 the largest of a row's 2048 draws is as large as a code (``sae.log_variance``).

The quickstart's model, text and rows: after one run ``--config.store=runs/variational/store``
serves the others of this folder. ``:topk`` trains the method to compare with. Hardware: 2 CPU
cores. 90 s, without harvest.
Expected: FVU 0.094 at L0 32.0, 70% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "variational": {"name": "variational", "k": 32, "kl_warmup_steps": 25},
    "topk": {"name": "topk", "k": 32},
}


def get_config(arg: str = "variational") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
