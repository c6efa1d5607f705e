"""A small instance of every method, with settings under which twenty steps show something."""

from saex.sae import SAES

D, N = 16, 64
SMALL = {
    "topk": {"k": 4},
    "relu": {"capacity": 64},
    "batch_topk": {"k": 4, "capacity": 32},
    "jump_relu": {"capacity": 64, "threshold": 0.1, "bandwidth": 0.1, "l0_warmup_steps": 10},
    "gated": {"capacity": 64, "l1_warmup_steps": 10},
    "abs_topk": {"k": 4},
    "multi_topk": {"k": 4},
    "jump_relu_tanh": {"sparsity": 0.1, "sparsity_warmup_steps": 10, "initial_l0": 16},
    "group_max": {"k": 4},
    "matryoshka": {"k": 4, "capacity": 32},
    "transcoder": {"d_out": 24, "capacity": 64, "l1_warmup_steps": 10},
    "skip_transcoder": {"d_out": 24, "k": 4, "aux_coefficient": 1 / 32},
    "crosscoder": {"widths": (10, 6), "capacity": 64},
    "batch_crosscoder": {"widths": (10, 6), "k": 4, "capacity": 32},
    "matching_pursuit": {"k": 4},
    "gradient_topk": {"k": 4},
    "multi_layer": {"k": 4, "sites": 3},
    "mutual_choice": {"k": 4, "capacity": 32, "density_rows": 300, "law_every": 2},
    "feature_choice": {"k": 4, "density_rows": 300, "law_every": 2},
    "adaptive_k": {"k_min": 2, "k_max": 8, "tune_from": 0.5, "probe_weight": 0.05},
    "kron": {"k": 4},
    "msae": {"k": 4},
    "group_bias": {"groups": 4, "every": 5},
    "variational": {"k": 4, "kl_warmup_steps": 10},
    "guided": {"k": 4, "concepts": 3, "label_coefficient": 0.1},
}


def small(name: str, **changes):
    """The method's small instance; one that is not in the table gets no settings."""
    return SAES[name](**{"d_in": D, "n": N, **SMALL.get(name, {}), **changes})


# Weights that a part of the loss holds constant: their gradient is a formula, and its test is the
# method's own.
HELD = {
    SAES["gated"]: ("W_dec", "b_dec"),
}
