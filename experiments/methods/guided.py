"""Guided SAE (SCAR): one latent is taught whether a byte of code stands in a comment.

    saex train --config=experiments/methods/guided.py --workdir=runs/guided

To look at: "label_accuracy" in metrics.jsonl against the share of the commoner label (its value
under ``--config.sae.label_coefficient=0``, where nothing is taught), FVU against TopK's, and latent
0 in the report.

The quickstart's model and rows, of a source that labels comments (``stdlib_comments``): the store
is one of its own, with the column "label", and serves TopK too
(``--config=experiments/methods/guided.py:topk --config.store=runs/guided/store``). Hardware: 2 CPU
cores. 73 s, with harvest.
Expected: FVU 0.068 at L0 32.0, 13% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "guided": {"name": "guided", "k": 32, "concepts": 1},
    "topk": {"name": "topk", "k": 32},
}


def get_config(arg: str = "guided") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "text": {"name": "stdlib_comments", "path": ""},
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
