"""A whole run in seconds: a tiny random model over a few generated documents."""

import pathlib
import random

import jax

from saex.config import Config, resolve

WORDS = "def return import class self for in range value key index print not and or".split()


def write_text(folder: pathlib.Path, files: int = 40) -> pathlib.Path:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=300)))
    return folder


def write_model(path: pathlib.Path) -> pathlib.Path:
    from saex.models import Transformer, save_model

    model = Transformer(d_model=16, n_layers=2, n_heads=2, d_mlp=32, context=32)
    save_model(path, model, model.init(jax.random.key(0)), {})
    return path


def mapping(folder: pathlib.Path, **changes) -> dict:
    """A configuration of 12 steps; `changes` are dotted fields, `sae__k=8`."""
    config = {
        "sae": {"name": "topk", "d_in": 16, "n": 64, "k": 4, "dead_after_tokens": 200},
        "site": "blocks.0.resid_post",
        "steps": 12,
        "subject": {"name": "trained", "path": str(folder / "model.safetensors")},
        "text": {"name": "files", "path": str(folder / "text")},
        "harvest": {"rows": 4000, "heldout_rows": 800, "batch": 8, "segment_rows": 1024},
        "stream": {"batch": 64, "window": 2},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every": 5},
        "log": {"every": 1, "tensorboard": False},
        "eval": {"contexts": 8, "controls": False},
        "report": {"enabled": False},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def config(folder: pathlib.Path, **changes) -> Config:
    return resolve(mapping(folder, **changes))
