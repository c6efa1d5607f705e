"""A small instance of every method, with settings under which twenty steps show something."""

from saex.sae import SAES

D, N = 16, 64
SMALL = {
    "topk": {"k": 4},
    "relu": {},
    "batch_topk": {"k": 4},
    "jump_relu": {"threshold": 0.1, "bandwidth": 0.1, "l0_warmup_steps": 10},
}


def small(name: str, **changes):
    """The method's small instance; one that is not in the table gets no settings."""
    return SAES[name](**{"d_in": D, "n": N, **SMALL.get(name, {}), **changes})
