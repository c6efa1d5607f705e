"""saex: train sparse autoencoders and their relatives in JAX.

    import saex
    sae, params = saex.load_sae("runs/quickstart")
    codes = sae.encode(params, activations)          # raw rows [b, d]
    reconstruction = sae.decode(params, codes)

Importing saex touches no device.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saex.checkpoint import load_sae as load_sae
    from saex.config import Config as Config
    from saex.config import resolve as resolve
    from saex.data import Store as Store
    from saex.data import StoreWriter as StoreWriter
    from saex.loop import train as train
    from saex.sae import SAES as SAES
    from saex.sae import DenseCodes as DenseCodes
    from saex.sae import ReLU as ReLU
    from saex.sae import SparseCodes as SparseCodes
    from saex.sae import TopK as TopK

_WHERE = {
    "load_sae": "checkpoint",
    "Config": "config",
    "resolve": "config",
    "Store": "data",
    "StoreWriter": "data",
    "train": "loop",
    "SAES": "sae",
    "DenseCodes": "sae",
    "ReLU": "sae",
    "SparseCodes": "sae",
    "TopK": "sae",
}

__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(
            f"module 'saex' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    import importlib

    return getattr(importlib.import_module(f"saex.{_WHERE[name]}"), name)
