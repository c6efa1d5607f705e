"""Pure maps of params to params: the same function, written otherwise."""

from saex.typing import Params


def fold_scale(params: Params) -> Params:
    """Put the input scale into the weights: ``scale`` becomes 1, codes and outputs stay the same.

    For affine encoders and decoders, whatever the activation: W_enc * c, W_dec / c, b_dec / c,
    with b_enc untouched, and thresholds, with which latents are compared. This is the form in which
    weights are handed to other libraries, which feed raw activations. Decoder rows then have norm
    1/c.
    """
    c = params["scale"]
    return {
        **params,
        "W_enc": params["W_enc"] * c,
        "W_dec": params["W_dec"] / c,
        "b_dec": params["b_dec"] / c,
        "scale": c / c,
    }
