"""Dictionaries: a method is one file here and one line in ``SAES``."""

from saex.sae.base import ArraySpec, Codes, DenseCodes, Dictionary, Out, SparseCodes
from saex.sae.relu import ReLU
from saex.sae.topk import TopK

SAES: dict[str, type] = {
    "topk": TopK,
    "relu": ReLU,
}

__all__ = [
    "SAES",
    "ArraySpec",
    "Codes",
    "DenseCodes",
    "Dictionary",
    "Out",
    "ReLU",
    "SparseCodes",
    "TopK",
]
