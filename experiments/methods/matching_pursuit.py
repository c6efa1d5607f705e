"""MP-SAE: matching pursuit as the encoder, sparsity chosen at inference.

    saex train --config=experiments/methods/matching_pursuit.py --workdir=runs/matching_pursuit

To look at: FVU at L0 up to 32 against TopK's, and FVU of the same checkpoint with fewer and more
steps: ``dataclasses.replace(sae, k=64)``.

The quickstart's model, text and rows: ``--config.store=runs/quickstart/store`` serves it.
``--config=experiments/methods/matching_pursuit.py:topk`` trains the method to compare with.
Hardware: 2 CPU cores; a step makes 32 times TopK's encoder products, hence batches of
half the rows that the others of this folder have. 704 s on one, without harvest.
Expected: FVU 0.042 at L0 31.9, no latent dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "matching_pursuit": {"k": 32},
    "topk": {"k": 32},
}


def get_config(arg: str = "matching_pursuit") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 1024},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
