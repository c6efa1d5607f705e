"""Causal language models of `transformers`, run by torch: read at any module, not edited.

torch and transformers are imported when a model is used, nowhere else in saex. Weights are read
from safetensors alone, and no code of a model's folder is executed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Integer

from saex.models.tokenizer import Pretrained
from saex.registry import choices, run_field

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A causal language model of `transformers`, with its tokenizer.

    path: its folder, as `save_pretrained` leaves it, or its name on the hub. dtype: of weights and
    forward pass. context: longest context that is read, and what a harvest takes unless told
    otherwise; never more than the model's positions. bos: token that contexts of text begin with,
    for tokenizers that have no BOS. device: as torch names it; '' is a GPU where there is one.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    context: int = 1024
    bos: str = ""
    device: str = run_field("")

    def __post_init__(self):
        if self.context < 2:
            raise ValueError(f"context={self.context}: at least 2 tokens")

    def load(self) -> tuple["CausalLM", dict]:
        """(model, {}): the weights are read when they are needed, and stay in torch.

        Raises ImportError without torch and transformers, FileNotFoundError or ValueError for a
        folder that holds no model, one without safetensors, or one that needs code of its own.
        """
        for name in ("torch", "transformers"):
            if importlib.util.find_spec(name) is None:
                raise ImportError(f"subject 'huggingface' needs {name}: pip install 'saex[torch]'")
        if os.path.isdir(self.path) or not HUB_NAME.fullmatch(self.path):
            _check_folder(self.path)
        return CausalLM(self), {}


class Place(NamedTuple):
    """What a site is: `module`'s input (`inside`) or output, `width` wide, the `order`-th seen."""

    module: str
    inside: bool
    width: int
    order: int


class Blocks(NamedTuple):
    """Where the parts of a block are, in one family: module names, and the modules of a block.

    attn_out and mlp_out are what is added to the residual stream; mlp_in is what the MLP reads.
    """

    layers: str
    attn_out: str
    mlp: str
    mlp_out: str


LLAMA = Blocks("model.layers", "self_attn", "mlp", "mlp")
# A norm stands between these and the residual stream.
NORM_BEHIND = Blocks(
    "model.layers", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"
)
FAMILIES: dict[str, Blocks] = {
    "gpt2": Blocks("transformer.h", "attn", "mlp", "mlp"),
    "gpt_neo": Blocks("transformer.h", "attn", "mlp", "mlp"),
    "gpt_neox": Blocks("gpt_neox.layers", "attention", "mlp", "mlp"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), NORM_BEHIND),
}


class _Reached(Exception):
    """The last site that is needed has been computed."""


class CausalLM:
    """A subject model like `saex.models.transformer.Transformer`, but run by torch.

    `traceable = False` says that `run` is no JAX program (it is not compiled) and knows no edits.
    Sites are module paths, which stand for the module's output (of a tuple the first), as far as
    that is one vector a token; and for the families of `FAMILIES` `blocks.N.resid_pre`,
    `.attn_out`, `.mlp_in`, `.mlp_out` and `.resid_post`.
    """

    traceable = False

    def __init__(self, section: HuggingFace):
        self.section = section
        self.tokenizer = Pretrained(section.path, section.bos)
        self._lock = threading.Lock()  # hooks of one pass must not see another one

    # ------------------------------------------------------------------------------- activations

    @functools.cached_property
    def sites(self) -> dict[str, int]:
        """Site name -> width, in the order in which the model computes them."""
        return {name: place.width for name, place in self._places.items()}

    @functools.cached_property
    def context(self) -> int:
        """Longest context that is read, in tokens."""
        return min(self.section.context, self._positions)

    def run(
        self,
        params: Mapping,
        tokens: Integer[Array | np.ndarray, "b t"],
        taps: Sequence[str] = (),
        edits: Mapping[str, Any] | None = None,
        stop_at: str | None = None,
        positions: Integer[Array | np.ndarray, "b t"] | None = None,
    ) -> tuple[Any, dict[str, Float[np.ndarray, "b t _"]]]:
        """One forward pass, without gradients; attention is causal, so padding belongs behind.

        params: not read. tokens: int [b, t]. taps: sites to return. edits: none. stop_at: last site
        to compute. positions: of each token in its document; where they begin anew another document
        does, which sees nothing of the one before. Returns (logits f32 [b, t, v], or None with
        stop_at; {site: f32 [b, t, d]}). Raises NotImplementedError for edits, KeyError for a site
        that the model has not, ValueError for one after `stop_at`, for ids outside the vocabulary,
        for too many tokens, and for positions where the model does not keep documents apart.
        """
        if edits:
            raise NotImplementedError(
                f"edit of {', '.join(edits)}: a model of transformers is read, not edited; use a "
                "model that saex runs itself (subject 'trained' or 'pocket-lm')"
            )
        self._check_sites(taps, stop_at)
        ids = self._check_tokens(np.array(tokens, np.int64))
        where = None if positions is None else np.array(positions, np.int64)
        acts: dict[str, np.ndarray] = {}
        with self._lock, contextlib.ExitStack() as hooks:
            if where is not None:  # before any hook of this pass, and behind the lock of others'
                self._check_apart()
            for site in dict.fromkeys(taps):
                hooks.enter_context(self._tap(site, acts))
            if stop_at is not None:  # the last hook of its module
                hooks.enter_context(self._hook(stop_at, _stop))
            try:
                logits = self._forward(ids, where)
            except _Reached:
                return None, acts
        return logits, acts

    def _forward(self, ids: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tokens = torch.as_tensor(ids, dtype=torch.long, device=self._device)
            how: dict[str, Any] = {"attention_mask": torch.ones_like(tokens)}
            if positions is not None:  # without a mask transformers makes one from these
                how = {"position_ids": torch.as_tensor(positions, device=self._device)}
            out = self.module(tokens, use_cache=False, **how)
            return out.logits.float().cpu().numpy()

    def _check_apart(self) -> None:
        if not self._apart:
            raise ValueError(
                f"{self.section.path!r}: in this version of transformers a document reads the one "
                "before it in its context; set harvest.pack=False"
            )

    @functools.cached_property
    def _apart(self) -> bool:
        """Whether the second of two documents is the same behind another first one, and alone."""
        ids = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 5, 6, 7, 8]], np.int64)
        behind = self._forward(ids, np.tile(np.arange(4), (2, 2)))[:, 4:]
        alone = self._forward(ids[:1, 4:])
        off = np.abs(behind - alone).max() / np.abs(alone).max()
        return bool(off < (1e-3 if self.section.dtype == "float32" else 0.1))

    def _tap(self, site: str, acts: dict[str, np.ndarray]) -> Any:
        import torch

        def keep(x: Any) -> None:  # a copy: later modules may work in place
            acts[site] = x.detach().to("cpu", torch.float32, copy=True).numpy()

        return self._hook(site, keep)

    def _hook(self, site: str, fn: Any) -> Any:
        """Calls fn(tensor) where the site is computed, until the handle is closed."""
        place = self._places[site]
        return _watch(self.module.get_submodule(place.module), place.inside, fn)

    def _check_sites(self, taps: Sequence[str], stop_at: str | None) -> None:
        for site in [*([stop_at] if stop_at else []), *taps]:
            if site not in self._places:
                names = choices(site, self._places)
                raise KeyError(f"no site {site!r} in {self.section.path!r}: it has {names}")
            if stop_at and self._places[site].order > self._places[stop_at].order:
                raise ValueError(f"site {site!r} comes after stop_at={stop_at!r}: move stop_at")

    def _check_tokens(self, tokens: np.ndarray) -> np.ndarray:
        vocab = self.module.get_input_embeddings().num_embeddings
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ValueError(
                f"token ids from {tokens.min()} to {tokens.max()}: {self.section.path!r} has "
                f"{vocab}"
            )
        if tokens.shape[1] > self._positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens: {self.section.path!r} has {self._positions} positions"
            )
        return tokens

    # ------------------------------------------------------------------------------ what is loaded

    @functools.cached_property
    def config(self) -> Any:
        """Its configuration, as transformers has it."""
        import transformers

        return self._pretrained(transformers.AutoConfig)

    @functools.cached_property
    def module(self) -> Any:
        """The torch module, in evaluation mode, on its device."""
        import torch
        import transformers

        dtype = getattr(torch, self.section.dtype)
        module = self._pretrained(
            transformers.AutoModelForCausalLM, dtype=dtype, use_safetensors=True
        )
        return module.eval().to(self._device)

    def _pretrained(self, factory: Any, **options: Any) -> Any:
        path = self.section.path
        try:
            return factory.from_pretrained(path, trust_remote_code=False, **options)
        except OSError as error:
            raise FileNotFoundError(
                f"{path!r} is no folder with a model, and transformers finds none of that name on "
                f"the hub ({str(error).splitlines()[0]})"
            ) from error
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"{path!r} brings code of its own, and saex executes no code of a "
                "model's folder: use an architecture that transformers knows"
            ) from error

    @functools.cached_property
    def _device(self) -> str:
        import torch

        return self.section.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def _positions(self) -> int:
        text = self.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or 2**31)

    @functools.cached_property
    def _places(self) -> dict[str, Place]:
        """Every site, found in a forward pass over two sequences of three tokens."""
        events: list[tuple[str, bool, int]] = []
        with contextlib.ExitStack() as hooks:
            for path, module in self.module.named_modules():
                for inside in (True, False):
                    note = functools.partial(_note, events, path, inside)
                    hooks.enter_context(_watch(module, inside, note))
            self._forward(np.zeros((2, 3), np.int64))
        return _named(events, _friendly(self.config))

    def describe(self) -> dict[str, Any]:
        """What decides its activations and tokens, for the meta of a store."""
        return {
            "architecture": type(self.module).__name__,
            "dtype": self.section.dtype,
            "tokenizer": self.tokenizer.describe(),
            "weights_sha256": self._weights,
        }

    @functools.cached_property
    def _weights(self) -> str:
        return _digest_weights(self.module)


# -------------------------------------------------------------------------------------------- sites


def _friendly(config: Any) -> dict[tuple[str, bool], list[str]]:
    """(module, inside) -> names; nothing for families that are not known."""
    blocks = FAMILIES.get(config.model_type)
    out: dict[tuple[str, bool], list[str]] = {}
    for i in range(config.num_hidden_layers if blocks else 0):
        assert blocks is not None
        layer, name = f"{blocks.layers}.{i}", f"blocks.{i}"
        for key, part in (
            ((layer, True), "resid_pre"),
            ((f"{layer}.{blocks.attn_out}", False), "attn_out"),
            ((f"{layer}.{blocks.mlp}", True), "mlp_in"),
            ((f"{layer}.{blocks.mlp_out}", False), "mlp_out"),
            ((layer, False), "resid_post"),
        ):
            out.setdefault(key, []).append(f"{name}.{part}")
    return out


def _named(
    events: list[tuple[str, bool, int]], friendly: Mapping[tuple[str, bool], list[str]]
) -> dict[str, Place]:
    """Sites by name, in order; modules that ran more than once are none."""
    counts: dict[tuple[str, bool], int] = {}
    for path, inside, _ in events:
        counts[path, inside] = counts.get((path, inside), 0) + 1
    out = {}
    for order, (path, inside, width) in enumerate(events):
        names = [*friendly.get((path, inside), ()), *([] if inside else [path])]
        if path and counts[path, inside] == 1:
            out |= {name: Place(path, inside, width, order) for name in names}
    return out


def _note(events: list[tuple[str, bool, int]], path: str, inside: bool, x: Any) -> None:
    if x.is_floating_point() and x.ndim == 3 and tuple(x.shape[:2]) == (2, 3):
        events.append((path, inside, int(x.shape[2])))


def _watch(module: Any, inside: bool, fn: Any) -> Any:
    """Calls fn with the module's input or output where that is (or begins with) a tensor."""
    import torch

    def before(module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, torch.Tensor):
            fn(x)

    def behind(module: Any, args: Any, out: Any) -> None:
        x = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(x, torch.Tensor):
            fn(x)

    if inside:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(behind)


def _stop(x: Any) -> None:
    raise _Reached


# ----------------------------------------------------------------------------------- files, digests


def _check_folder(path: str) -> None:
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"no folder {path!r}: name the folder of a model, or one on the hub"
        )
    files = os.listdir(path)
    if "config.json" not in files:
        raise FileNotFoundError(
            f"{path!r} has no config.json: expected a folder as save_pretrained leaves it"
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"{path!r} has no .safetensors file: saex opens no pickled weights; convert them with "
            "save_pretrained(folder) of transformers, in a place where you trust them"
        )


def _digest_weights(module: Any) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of what the module holds."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()
