"""What ``quality.py`` asks of each library: methods, learning rates and penalties to start from.

Every library has a file with ``train(method, settings, data, value, lr, seed) -> Trained``; value
is that of the method's own setting (``SETTINGS``), which the sweep moves until L0 is as wanted.
"""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from quality_weights import Weights

INSTALL = "see the header of quality.py for the environment that has all libraries"
SAE_METHODS = ("relu", "gated", "jump_relu", "topk", "batch_topk", "matryoshka")
TRANSCODERS = ("transcoder", "skip_transcoder")
METHODS = SAE_METHODS + TRANSCODERS
EXACT = ("topk", *TRANSCODERS)  # L0 is k: nothing to sweep
PREFIXES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)  # Matryoshka's groups, for all libraries


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all libraries are given.

    Fields:
      d, n: widths. l0: active latents at which all are compared. steps, batch: the budget.
      warmup, decay: steps of linear rise of the learning rate from 0 and of linear fall to 0.
      dead_after: rows without firing after which a latent is dead.
    """

    d: int
    n: int
    l0: int
    steps: int
    batch: int
    warmup: int
    decay: int
    dead_after: int


@dataclasses.dataclass(frozen=True)
class Data:
    """Raw training rows, float32.

    Fields:
      batches: step -> {"x": [batch, d], "y": [batch, o]} (y of transcoders alone).
      sample: some thousand rows. scales: by column, with which its mean squared norm is 1.
      done: to be called after the last step, before anything is exported.
    """

    batches: Callable[[int], Mapping[str, np.ndarray]]
    sample: Mapping[str, np.ndarray]
    scales: Mapping[str, float]
    done: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """weights: for raw rows. forward: the library's own inference on raw rows, to compare with."""

    weights: Weights
    forward: Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Library:
    """A module with ``train``, its methods, and the packages that its results depend on.

    Rates are multiples (``around``) of what the library recommends, ``rate(method, n)``: its runs
    are made for hundreds of times the steps, so the larger ones are tried as well.
    """

    module: str
    methods: tuple[str, ...]
    packages: tuple[str, ...]
    rate: Callable[[str, int], float]
    around: tuple[float, ...] = (1, 4, 16, 64)

    def train(self, *args: Any) -> Trained:
        """See the module."""
        return importlib.import_module(self.module).train(*args)

    def rates(self, method: str, n: int) -> list[float]:
        """The learning rates to try."""
        return [float(f"{self.rate(method, n) * factor:.3g}") for factor in self.around]

    def version(self) -> str:
        """Of its packages."""
        return " ".join(f"{p} {importlib.metadata.version(p)}" for p in self.packages)


def _long_run_rule(method: str, n: int) -> float:
    return 2e-4 / (n / 2**14) ** 0.5


def _dictionary_learning_rate(method: str, n: int) -> float:
    """Its classes' rule for the TopK family, its demo's rate for the others."""
    return _long_run_rule(method, n) if "topk" in method or method == "matryoshka" else 3e-4


LIBRARIES = {
    "saex": Library("quality_saex", METHODS, ("saex", "jax"), _long_run_rule),
    "sae_lens": Library(
        "quality_sae_lens", SAE_METHODS, ("sae-lens", "torch"), lambda method, n: 3e-4
    ),
    "dictionary_learning": Library(
        "quality_dictionary_learning",
        SAE_METHODS,
        ("dictionary-learning", "torch"),
        _dictionary_learning_rate,
    ),
    "sparsify": Library(  # its default optimiser, whose steps have the rate's size
        "quality_sparsify",
        TRANSCODERS,
        ("eai-sparsify", "schedulefree", "torch"),
        lambda method, n: 25 * _long_run_rule(method, n),
        (1 / 16, 1 / 4, 1, 4),
    ),
    "sparsify_adam": Library(
        "quality_sparsify_adam", TRANSCODERS, ("eai-sparsify", "torch"), _long_run_rule
    ),
}

# What is swept, and where the sweep starts, for an L0 of about 32 of 512 latents. SAELens' rows
# have norm sqrt(d): its squares are d times, its L1 sqrt(d) times, as large as the others'.
L1 = {"saex": 0.06, "dictionary_learning": 0.06, "sae_lens": 1.0}
SETTINGS: dict[str, dict[str, tuple[str, float | None]]] = {
    "relu": {name: ("l1", value) for name, value in L1.items()},
    "gated": {name: ("l1", 2 * value) for name, value in L1.items()},
    "jump_relu": {
        "saex": ("l0", 5e-4),
        "sae_lens": ("l0", 0.12),
        "dictionary_learning": ("target_l0", None),
    },
}
RISING = ("k", "target_l0")  # settings with which L0 rises; it falls with penalties


def setting(method: str, library: str, l0: int) -> tuple[str, float]:
    """(name of what is swept, value to start from; None stands for the L0 itself)."""
    name, value = SETTINGS.get(method, {}).get(library, ("k", None))
    return name, float(l0) if value is None else value


def peer(module: str) -> Any:
    """A peer's module, or the end of the program with what to do."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another build raises RuntimeError, not ImportError
        raise SystemExit(f"cannot import {module} ({error}): {INSTALL}") from error


def array(tensor: Any) -> np.ndarray:
    """A tensor's values, float32, as an array of its own."""
    return tensor.detach().cpu().numpy().astype(np.float32).copy()


def no_grad(module: Any, x_scale: float, y_scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """A torch module that sees x * x_scale and makes y * y_scale, on raw rows."""
    torch = peer("torch")

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return array(module(torch.from_numpy(x * np.float32(x_scale)))) / np.float32(y_scale)

    return forward
