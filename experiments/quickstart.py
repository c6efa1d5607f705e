"""A real SAE on a real (small) language model in minutes, on a laptop.

    saex train --config=experiments/quickstart.py --workdir=runs/quickstart

Harvests 1M activations of pocket-lm reading the Python standard library, trains a TopK SAE on them,
evaluates it on held-out files, and writes runs/quickstart/report.html.
``--config=experiments/quickstart.py:relu`` trains a ReLU SAE instead.
"""

from ml_collections import ConfigDict

SAES = {
    "topk": {"k": 32, "dead_after_tokens": 250_000},
    "relu": {"l1": 0.02, "l1_warmup_steps": 30, "dead_after_tokens": 250_000},
}


def get_config(arg: str = "topk") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 600,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 4096},
            "eval": {"rows": 250_000, "contexts": 128},
        },
    )
