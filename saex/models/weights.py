"""Trained transformers on disk: one safetensors file, hyper-parameters as JSON in its metadata."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors
from safetensors.numpy import save

from saex.models.transformer import Transformer

FILE_NAME = "model.safetensors"


def save_model(path: str | os.PathLike, model: Transformer, params, info: Mapping) -> None:
    """Writes the weights as fp16, with `info` (JSON values) in the metadata; replaces the file."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    arrays = {".".join(k.key for k in keys): np.asarray(x, np.float16) for keys, x in flat}
    metadata = {"model": json.dumps(dataclasses.asdict(model)), "info": json.dumps(dict(info))}
    unfinished = Path(f"{path}.tmp")
    unfinished.write_bytes(save(arrays, metadata))
    os.replace(unfinished, path)


def load_model(path: str | os.PathLike) -> tuple[Transformer, dict]:
    """(model, params as fp32 numpy arrays) from a file of `save_model` or a folder that holds one.

    Raises FileNotFoundError, or ValueError where the file is cut short, carries no
    hyper-parameters, or does not fit them; nothing but the header is read before they are checked.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {str(path)!r}: expected a safetensors file")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            model = _read_config(path, file.metadata() or {})
            expected = _expected(model)
            _check_arrays(path, file, expected)
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in expected}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no complete safetensors file ({error})") from error
    return model, _nest(arrays)


def _read_config(path: Path, metadata: Mapping) -> Transformer:
    if "model" not in metadata:
        raise ValueError(f"{str(path)!r} names no model in its metadata: not written by saex")
    try:
        return Transformer(**json.loads(metadata["model"]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r}: bad hyper-parameters in the metadata ({error})"
        ) from error


def _expected(model: Transformer) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    return {".".join(k.key for k in keys): x.shape for keys, x in flat}


def _check_arrays(path: Path, file, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        raise ValueError(
            f"{str(path)!r} does not fit its own hyper-parameters: array {wrong[0]!r} is "
            f"{found.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'absent')}"
        )


def _nest(arrays: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, array in arrays.items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree
