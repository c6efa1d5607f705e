"""Dictionaries: a method is one file here and one line in ``SAES``."""

from saex.sae.abs_topk import AbsTopK
from saex.sae.base import ArraySpec, Codes, DenseCodes, Dictionary, Out, SparseCodes
from saex.sae.batch_crosscoder import BatchCrosscoder
from saex.sae.batch_topk import BatchTopK
from saex.sae.crosscoder import Crosscoder
from saex.sae.gated import Gated
from saex.sae.gradient_topk import GradientTopK
from saex.sae.group_max import GroupMax
from saex.sae.jump_relu import JumpReLU
from saex.sae.jump_relu_tanh import JumpReLUTanh
from saex.sae.matching_pursuit import MatchingPursuit
from saex.sae.matryoshka import Matryoshka
from saex.sae.multi_layer import MultiLayer
from saex.sae.multi_topk import MultiTopK
from saex.sae.relu import ReLU
from saex.sae.skip_transcoder import SkipTranscoder
from saex.sae.topk import TopK
from saex.sae.transcoder import Transcoder

SAES: dict[str, type] = {
    "topk": TopK,
    "relu": ReLU,
    "batch_topk": BatchTopK,
    "jump_relu": JumpReLU,
    "gated": Gated,
    "abs_topk": AbsTopK,
    "multi_topk": MultiTopK,
    "jump_relu_tanh": JumpReLUTanh,
    "group_max": GroupMax,
    "matryoshka": Matryoshka,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "crosscoder": Crosscoder,
    "batch_crosscoder": BatchCrosscoder,
    "matching_pursuit": MatchingPursuit,
    "gradient_topk": GradientTopK,
    "multi_layer": MultiLayer,
}

__all__ = [
    "SAES",
    "AbsTopK",
    "ArraySpec",
    "BatchCrosscoder",
    "BatchTopK",
    "Codes",
    "Crosscoder",
    "DenseCodes",
    "Dictionary",
    "Gated",
    "GradientTopK",
    "GroupMax",
    "JumpReLU",
    "JumpReLUTanh",
    "MatchingPursuit",
    "Matryoshka",
    "MultiLayer",
    "MultiTopK",
    "Out",
    "ReLU",
    "SkipTranscoder",
    "SparseCodes",
    "TopK",
    "Transcoder",
]
