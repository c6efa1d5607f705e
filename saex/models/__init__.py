"""Subject models: what activations are taken from, and what edits are tried on.

Another model is one row of `MODELS`: a frozen dataclass, its config section, whose
`load() -> (model, params)` gives an object with `sites`, `run` and `context`, as
`saex.models.transformer.Transformer` has them. One that reads other tokens than bytes has a
`tokenizer` (see `saex.models.tokenizer`); one whose `run` is no JAX program says
`traceable = False`: it is not compiled, and not edited; one that is no dataclass says by
`describe()` what decides its activations. Contexts are packed for those whose `run` takes
`positions`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from saex.models.huggingface import HuggingFace
from saex.models.several import Several
from saex.models.transformer import BOS, Edit, Transformer, decode, encode, next_token_nats
from saex.models.weights import load_model, save_model

Matmul = Literal["float32", "bfloat16"]
POCKET_LM = Path(__file__).parent / "pocket_lm.safetensors"


@dataclasses.dataclass(frozen=True)
class PocketLM:
    """The byte language model of the package: 4 layers, width 256, trained on Python sources.

    matmul: type of matmul inputs; bfloat16 is how it was trained, and about twice as fast.
    """

    matmul: Matmul = "bfloat16"

    def load(self) -> tuple[Transformer, dict]:
        """(model, params as fp32 numpy arrays); FileNotFoundError where the weights are missing."""
        return Trained(str(POCKET_LM), self.matmul).load()


@dataclasses.dataclass(frozen=True)
class Trained:
    """A transformer of `saex pretrain`: its workdir, or one of the safetensors files in it."""

    path: str
    matmul: Matmul = "bfloat16"

    def load(self) -> tuple[Transformer, dict]:
        """(model, params as fp32 numpy arrays); FileNotFoundError or ValueError for a bad file."""
        model, params = load_model(self.path)
        return dataclasses.replace(model, matmul=self.matmul), params


@dataclasses.dataclass(frozen=True)
class Models:
    """Transformers of `saex pretrain` over the same tokens, for dictionaries that compare them.

    paths: name -> path, as of `Trained`, or "pocket-lm" for the one of the package. Their sites are
    `NAME.SITE`. matmul: as of `PocketLM`.
    """

    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    matmul: Matmul = "bfloat16"

    def load(self) -> tuple[Several, dict]:
        """(models, {name: params as fp32 numpy arrays}); errors as of `Trained`."""
        paths = {n: str(POCKET_LM) if p == "pocket-lm" else p for n, p in self.paths.items()}
        loaded = {name: Trained(path, self.matmul).load() for name, path in paths.items()}
        models = Several(tuple((name, model) for name, (model, _) in loaded.items()))
        return models, {name: params for name, (_, params) in loaded.items()}


MODELS = {"pocket-lm": PocketLM, "trained": Trained, "several": Models, "huggingface": HuggingFace}

__all__ = [
    "BOS",
    "MODELS",
    "Edit",
    "HuggingFace",
    "Models",
    "PocketLM",
    "Several",
    "Trained",
    "Transformer",
    "decode",
    "encode",
    "load_model",
    "next_token_nats",
    "save_model",
]
