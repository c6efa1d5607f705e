"""JumpReLU with tanh sparsity and a pre-activation loss.

    saex train --config=experiments/methods/jump_relu_tanh.py --workdir=runs/jump_relu_tanh

To look at: L0, which should fall over the whole run as the weight of the tanh grows, and dead
latents; against JumpReLU with the straight-through count at the L0 that comes out.

The quickstart's model, text and rows: after one run ``--config.store=runs/jump_relu_tanh/store``
serves the others of this folder. ``--config=experiments/methods/jump_relu_tanh.py:jump_relu``
trains the method to compare with. Hardware: 2 CPU cores. 48 s, without harvest.
Expected: FVU 0.172 at L0 41.1, 2.6% of the latents dead on held-out rows.
"""

from ml_collections import ConfigDict

SAES = {
    "jump_relu_tanh": {"sparsity": 1.0, "initial_l0": 256},
    "jump_relu": {"l0": 1e-3, "l0_warmup_steps": 100, "bandwidth": 0.03, "threshold": 0.03},
}


def get_config(arg: str = "jump_relu_tanh") -> ConfigDict:
    return ConfigDict(
        {
            "sae": {"name": arg, "d_in": 256, "n": 2048, "dead_after_tokens": 100_000, **SAES[arg]},
            "site": "blocks.1.resid_post",
            "steps": 300,
            "harvest": {"rows": 600_000, "heldout_rows": 210_000},
            "stream": {"batch": 2048},
            "optim": {"lr": 1e-3},
            "eval": {"rows": 100_000, "contexts": 64},
        },
    )
