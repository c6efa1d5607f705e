"""Pre-activations of affine encoders, whatever the method selects among them.

What transformations of params have to know of a class beyond its arrays is said here.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.kernels.encode_topk import pre_activations
from saex.sae.abs_topk import AbsTopK
from saex.sae.adaptive_k import AdaptiveK
from saex.sae.batch_crosscoder import BatchCrosscoder
from saex.sae.batch_topk import BatchTopK
from saex.sae.crosscoder import Crosscoder
from saex.sae.feature_choice import FeatureChoice
from saex.sae.gated import Gated
from saex.sae.gradient_topk import GradientTopK
from saex.sae.group_bias import GroupBias
from saex.sae.group_max import GroupMax
from saex.sae.guided import Guided
from saex.sae.jump_relu import JumpReLU
from saex.sae.jump_relu_tanh import JumpReLUTanh
from saex.sae.matryoshka import Matryoshka
from saex.sae.msae import MSAE
from saex.sae.multi_layer import MultiLayer, standardised
from saex.sae.multi_topk import MultiTopK
from saex.sae.mutual_choice import MutualChoice
from saex.sae.relu import ReLU
from saex.sae.sites import norms
from saex.sae.skip_transcoder import SkipTranscoder
from saex.sae.top_afa import TopAFA
from saex.sae.topk import TopK
from saex.sae.transcoder import Transcoder
from saex.sae.variational import Variational
from saex.typing import Params

# f = relu(p), p = (x - b_dec) W_enc^T + b_enc, where it is selected by its size.
SELECTED = (TopK, MultiTopK, MSAE, GroupMax, GradientTopK, AdaptiveK, Guided, Variational, TopAFA)
# f = p where p is above "threshold", of all latents or of each.
THRESHOLDED = (BatchTopK, Matryoshka, MutualChoice, FeatureChoice, BatchCrosscoder)
# Nothing is taken from x: p = x W_enc^T + b_enc.
NOT_CENTRED = (ReLU, JumpReLUTanh, Crosscoder, BatchCrosscoder, SkipTranscoder)
CENTRED = (*SELECTED, *THRESHOLDED[:-1], JumpReLU, AbsTopK, MultiLayer)
APART = (Gated, GroupBias)  # whether a latent fires is told by another number than how large it is


def sizes(sae: Any, params: Params, x: Any) -> tuple[Float[Array, "b n"], Any]:
    """(what latents are selected by, its units): pre-activations over the units are codes.

    Args:
      sae, params: of a method with an affine encoder. x: raw rows [b, d].

    Returns:
      (float32 [b, n], a number or one a latent): |p| of AbsTopK, p N of BatchCrosscoder with units
      N, p of the others with units 1.

    Raises:
      ValueError: codes are not made of one affine map of the row.
    """
    if isinstance(sae, APART):
        raise ValueError(
            f"{type(sae).__name__} opens a latent by another number than its code: "
            "to_jump_relu(sae, params) first"
        )
    if not isinstance(sae, (*CENTRED, *NOT_CENTRED, Transcoder)):
        raise ValueError(
            f"{type(sae).__name__} has no affine encoder whose values could be compared with a "
            "threshold; those of saex.sae.encoders have one"
        )
    x = standardised(jnp.asarray(x))[0] if isinstance(sae, MultiLayer) else jnp.asarray(x)
    x = x.astype(jnp.float32) * entries(params["scale"])
    p = pre_activations(x, _taken(sae, params), params["W_enc"], params["b_enc"], sae.matmul_dtype)
    if isinstance(sae, BatchCrosscoder):
        units = jnp.sum(norms(params["W_dec"], sae.site_widths), axis=1)
        return p * units[None], units
    return jnp.abs(p) if isinstance(sae, AbsTopK) else p, 1.0


def _taken(sae: Any, params: Params) -> Any:
    """What the encoder takes from a row, in scaled units."""
    if isinstance(sae, Transcoder):
        return params["b_in"]
    return jnp.zeros((sae.d_in,)) if isinstance(sae, NOT_CENTRED) else params["b_dec"]


def entries(scale: Any) -> Any:
    """A scale, shaped to multiply rows: a number, or one for each entry of a row."""
    return scale[None] if jnp.ndim(scale) else scale
