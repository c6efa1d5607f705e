"""AdaptiveK: a probe of a row's complexity says how many latents it gets.

    saex train --config=experiments/methods/adaptive_k.py --workdir=runs/adaptive_k

To look at: "probe" (its mean squared error) in metrics.jsonl, the mean L0, and FVU against TopK at
that L0.

The column "complexity" is here the position in the context (0 to 255; later bytes have more behind
them), which shows the machinery and no claim about complexity. For a score of your own write it as
a column of a store and set ``config.columns``, ``lowest`` and ``highest``.

``--config=experiments/methods/adaptive_k.py:topk`` is TopK; compare at the L0 that comes out.
Hardware: 2 CPU cores. 58 s, without harvest.
Expected: FVU 0.054 at L0 53.4, 0.05% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "adaptive_k": {"k_min": 8, "k_max": 96, "lowest": 0.0, "highest": 255.0},
    "topk": {"k": 52},
}


def get_config(arg: str = "adaptive_k") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "columns": {"complexity": "position"} if arg == "adaptive_k" else {},
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
