"""Pure maps of params to params: the same function, written otherwise."""

from saex.typing import Params


def fold_scale(params: Params) -> Params:
    """Put the input scale into the weights: ``scale`` becomes 1, codes and outputs stay the same.

    For affine encoders and decoders, whatever the activation: W_enc * c, W_dec / c, b_dec / c,
    with b_enc untouched, and thresholds, with which latents are compared. This is the form in which
    weights are handed to other libraries, which feed raw activations. Decoder rows then have norm
    1/c. Of transcoders, which write rows of another kind, ``y_scale`` becomes 1 too. A scale may
    be one number for each entry of a row (of crosscoders). Where the atoms are the encoder as well
    (matching pursuit, no W_enc) they stay unit vectors.
    """
    c = params["scale"]
    out = params.get("y_scale", c)
    entries = lambda scale: scale[None] if scale.ndim else scale  # noqa: E731
    folded = {**params, "scale": c / c, "b_dec": params["b_dec"] / out}
    if "W_enc" in params:
        folded["W_enc"] = params["W_enc"] * entries(c)
        folded["W_dec"] = params["W_dec"] / entries(out)
    if "b_in" in params:
        folded["b_in"] = params["b_in"] / c
    if "W_skip" in params:
        folded["W_skip"] = params["W_skip"] * (c / out)
    if "y_scale" in params:
        folded["y_scale"] = out / out
    return folded
