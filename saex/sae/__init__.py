"""Dictionaries: a method is one file here and one line in ``SAES``."""

from saex.sae.abs_topk import AbsTopK
from saex.sae.adaptive_k import AdaptiveK
from saex.sae.base import ArraySpec, Codes, DenseCodes, Dictionary, Out, SparseCodes
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
from saex.sae.kron import KronSAE
from saex.sae.matching_pursuit import MatchingPursuit
from saex.sae.matryoshka import Matryoshka
from saex.sae.msae import MSAE
from saex.sae.multi_layer import MultiLayer
from saex.sae.multi_topk import MultiTopK
from saex.sae.mutual_choice import MutualChoice
from saex.sae.relu import ReLU
from saex.sae.skip_transcoder import SkipTranscoder
from saex.sae.top_afa import TopAFA
from saex.sae.topk import TopK
from saex.sae.transcoder import Transcoder
from saex.sae.variational import Variational

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
    "kron": KronSAE,
    "top_afa": TopAFA,
    "mutual_choice": MutualChoice,
    "feature_choice": FeatureChoice,
    "adaptive_k": AdaptiveK,
    "msae": MSAE,
    "group_bias": GroupBias,
    "variational": Variational,
    "guided": Guided,
}

__all__ = [
    "MSAE",
    "SAES",
    "AbsTopK",
    "AdaptiveK",
    "ArraySpec",
    "BatchCrosscoder",
    "BatchTopK",
    "Codes",
    "Crosscoder",
    "DenseCodes",
    "Dictionary",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "GroupBias",
    "GroupMax",
    "Guided",
    "JumpReLU",
    "JumpReLUTanh",
    "KronSAE",
    "MatchingPursuit",
    "Matryoshka",
    "MultiLayer",
    "MultiTopK",
    "MutualChoice",
    "Out",
    "ReLU",
    "SkipTranscoder",
    "SparseCodes",
    "TopAFA",
    "TopK",
    "Transcoder",
    "Variational",
]
