"""What rows may be given as: whatever numpy takes, and tensors of torch, which is not imported."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from saex.data.manifest import StoreError


def as_numpy(name: str, values: Any) -> np.ndarray:
    """Values as a numpy array, exact, without a copy where that can be.

    Args:
      name: of the column, for messages.
      values: numpy and JAX arrays, lists; tensors of torch, on any device, with a gradient or
        without; bfloat16 becomes numpy's (of ml_dtypes).

    Raises:
      StoreError: no array can be made of it.
    """
    try:
        return _of_torch(values) if hasattr(values, "detach") else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as err:
        raise StoreError(
            f"column {name!r} was given {_described(values)}, of which no array can be made "
            f"({err}): give an array of numpy, JAX or torch, or lists of one length"
        ) from err


def _of_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    # numpy has no such type of its own, so the bits go over as another one of their size.
    bits = tensor.view(sys.modules["torch"].int16).numpy()
    return bits.view(ml_dtypes.bfloat16)


def _described(values: Any) -> str:
    return f"{type(values).__name__} of dtype {getattr(values, 'dtype', 'none')}"
