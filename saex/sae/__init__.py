"""Dictionaries: a method is one file here and one line in ``SAES``."""

from saex.sae.base import ArraySpec, Codes, DenseCodes, Dictionary, Out, SparseCodes
from saex.sae.batch_topk import BatchTopK
from saex.sae.jump_relu import JumpReLU
from saex.sae.relu import ReLU
from saex.sae.topk import TopK

SAES: dict[str, type] = {
    "topk": TopK,
    "relu": ReLU,
    "batch_topk": BatchTopK,
    "jump_relu": JumpReLU,
}

__all__ = [
    "SAES",
    "ArraySpec",
    "BatchTopK",
    "Codes",
    "DenseCodes",
    "Dictionary",
    "JumpReLU",
    "Out",
    "ReLU",
    "SparseCodes",
    "TopK",
]
