"""A TopK SAE of n = 1,048,576 latents for activations of width 4096, on a slice of four v5p chips.

    saex info --config=experiments/wide.py --hardware=v5p
    saex train --config=experiments/wide.py --dry_run --hardware=v5p
    saex train --config=experiments/wide.py --workdir=runs/wide --config.store=gs://...

Hardware: TPU v5p, topology 2x2x1, never run there. The step was compiled for that slice: of a
chip's 103 GB it holds 26 of weights and optimiser, and 40 in all; tests/aot/test_memory.py asks the
compiler again. Initial weights are made in parts, each chip its own: about 37 GB meanwhile. Time: a
floor of 63 ms a step by ``saex info``, no claim about what it takes.

Latents are split four ways and rows not at all: the sum of gradients over rows would be 34 GB a
step, the sum of reconstructions over latents is 0.1 GB. ``store`` needs activations harvested
before (a width of 4096 is no model of saex's).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "sae": {
                "name": "topk",
                "d_in": 4096,
                "n": 2**20,
                "k": 64,
                "matmul_dtype": "bfloat16",
            },
            "site": "resid_post",
            "tokens": 4_000_000_000,
            "subject": None,
            "stream": {"batch": 8192},
            "mesh": {"model": 4},
            "eval": {"controls": False},
        }
    )
