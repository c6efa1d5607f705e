"""MSAE: several k at once, and all of relu(p).

    saex train --config=experiments/methods/msae.py --workdir=runs/msae

To look at: "fvu_1k" to "fvu_8k" and "fvu_whole" in metrics.jsonl, and FVU at L0 32 against TopK's,
which trains for that alone.

The quickstart's model, text and rows: after one run ``--config.store=runs/msae/store`` serves the
others of this folder. ``:reverse`` weighs the sparsest level most; ``:topk`` trains the method to
compare with. Hardware: 2 CPU cores. 109 s, without harvest.
Expected: FVU 0.078 at L0 32.0, 0.1% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "msae": {"name": "msae", "k": 32},
    "reverse": {"name": "msae", "k": 32, "weights": "reverse"},
    "topk": {"name": "topk", "k": 32},
}


def get_config(arg: str = "msae") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 4e-3, "clip": 0.01},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
